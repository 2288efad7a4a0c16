// RUN: spikingbrain opt -p spike-to-int --target riscv64 %s | filecheck %s

// Without vector kernels: products of counts and codes in i32, sums of them in i64, floats only outside.
// CHECK-LABEL: func.func @portable(
// CHECK:         linalg.generic {{.*}}["parallel", "reduction"]
// CHECK:           math.absf
// CHECK:           arith.extf %{{.+}} : f32 to f64
// CHECK:         arith.maximumf
// CHECK:         arith.minimumf
// CHECK:         arith.divf
// CHECK:         math.roundeven
// CHECK:         arith.fptosi %{{.+}} : f32 to i32
// CHECK:         linalg.generic {{.*}}["parallel", "parallel", "parallel", "reduction"]
// CHECK:           arith.extsi %{{.+}} : i8 to i32
// CHECK:           arith.muli
// CHECK:           arith.extsi %{{.+}} : i32 to i64
// CHECK:           arith.addi
// CHECK-NOT:     spike
// CHECK:         return
func.func @portable(%x: tensor<1x?x64xf32>, %w: tensor<40x64xi8>, %scale: tensor<40x2xf32>) -> tensor<1x?x40xf32> {
  %counts, %threshold = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}
      : (tensor<1x?x64xf32>) -> (tensor<1x?x64xf32>, tensor<1x?xf32>)
  %y = "spikingbrain.spike_linear"(%counts, %threshold, %w, %scale) {bits = 8 : i64}
      : (tensor<1x?x64xf32>, tensor<1x?xf32>, tensor<40x64xi8>, tensor<40x2xf32>) -> tensor<1x?x40xf32>
  return %y : tensor<1x?x40xf32>
}

// A vector is a row on its own; counts and threshold may be asked for too.
// CHECK-LABEL: func.func @vector(
// CHECK:         %[[V:.+]] = tensor.collapse_shape %{{.+}} [] : tensor<1xf32> into tensor<f32>
// CHECK:         return %{{.+}}, %[[V]]
func.func @vector(%x: tensor<8xf32>) -> (tensor<8xf32>, tensor<f32>) {
  %counts, %threshold = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}
      : (tensor<8xf32>) -> (tensor<8xf32>, tensor<f32>)
  return %counts, %threshold : tensor<8xf32>, tensor<f32>
}
