// RUN: spikingbrain opt -p weights-to-arguments %s | filecheck %s

// Each distinct weight becomes one argument at the end, however often it is read.
// CHECK-LABEL: func.func @region
// CHECK-SAME: tensor<2x8xf32>, %{{.*}}: tensor<4x8xf32>) -> (tensor<4x8xf32>, tensor<4x8xf32>, tensor<2x8xf32>)
// CHECK-NOT: spikingbrain.parameter
func.func @region(%x: tensor<2x8xf32>) -> (tensor<4x8xf32>, tensor<4x8xf32>, tensor<2x8xf32>) attributes {spikingbrain.weight_arguments} {
  %a = "spikingbrain.parameter"() {sources = ["w0"], recipe = []} : () -> tensor<4x8xf32>
  %b = "spikingbrain.parameter"() {sources = ["w0"], recipe = []} : () -> tensor<4x8xf32>
  return %a, %b, %x : tensor<4x8xf32>, tensor<4x8xf32>, tensor<2x8xf32>
}

// A function without the mark keeps its weights.
// CHECK-LABEL: func.func @entry
// CHECK: spikingbrain.parameter
func.func @entry() -> tensor<4x8xf32> {
  %a = "spikingbrain.parameter"() {sources = ["up"], recipe = []} : () -> tensor<4x8xf32>
  return %a : tensor<4x8xf32>
}
