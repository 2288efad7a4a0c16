// RUN: spikingbrain opt -p lower-linear --target maca %s | filecheck %s

// Waves read a weight as it is stored; the launch says that it multiplies, so that a library may do it.
// CHECK:       func.func private @[[KERNEL:linear_f32_k4_n40_m]](
// CHECK-SAME:    spikingbrain.threads = 256 : i64
// CHECK:         __builtin_mxc_mma_16x16x4f32
// CHECK-LABEL: func.func @any_rows(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: tensor<?x4xf32>, %[[W:[a-z0-9]+]]:
// CHECK:         "spikingbrain_control.launch"({{.*}}%[[X]], %[[W]], {{.*}}) {callee = @[[KERNEL]], spikingbrain.multiplies, tied = [-1]}
func.func @any_rows(%x: tensor<?x4xf32>, %w: tensor<40x4xf32>) -> tensor<?x40xf32> {
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<40x4xf32>) -> tensor<?x40xf32>
  return %y : tensor<?x40xf32>
}

// A gate is computed by the kernel for few rows, which reads what the gate is made of; the one for many rows reads the gate, and writes
// where the first would have.
// CHECK-LABEL: func.func @gate(
// CHECK-SAME:      %[[J:[a-z0-9]+]]: tensor<?x64xf32>
// CHECK:         %[[GATE:.+]] = linalg.generic
// CHECK:         %[[FEW:.+]] = "spikingbrain_control.launch"({{.*}}%[[J]], {{.*}}) {callee = @linear_f32_k32_n8_m_{{[0-9a-f]+}}, tied = [-1]}
// CHECK:         %[[Y:.+]] = "spikingbrain_control.launch"({{.*}}%[[GATE]], {{.*}}, %[[FEW]]) {callee = @linear_f32_k32_n8_m_many, spikingbrain.multiplies, tied = [2]}
// CHECK:         return %[[Y]]
func.func @gate(%joint: tensor<?x64xf32>) -> tensor<?x8xf32> {
  %c0 = arith.constant 0 : index
  %m = tensor.dim %joint, %c0 : tensor<?x64xf32>
  %a = tensor.extract_slice %joint[0, 0] [%m, 32] [1, 1] : tensor<?x64xf32> to tensor<?x32xf32>
  %b = tensor.extract_slice %joint[0, 32] [%m, 32] [1, 1] : tensor<?x64xf32> to tensor<?x32xf32>
  %empty = tensor.empty(%m) : tensor<?x32xf32>
  %gate = linalg.generic {indexing_maps = [affine_map<(i, j) -> (i, j)>, affine_map<(i, j) -> (i, j)>, affine_map<(i, j) -> (i, j)>], iterator_types = ["parallel", "parallel"]}
      ins(%a, %b : tensor<?x32xf32>, tensor<?x32xf32>) outs(%empty : tensor<?x32xf32>) {
  ^bb0(%x: f32, %y: f32, %o: f32):
    %e = math.tanh %x : f32
    %p = arith.mulf %e, %y : f32
    linalg.yield %p : f32
  } -> tensor<?x32xf32>
  %w = "spikingbrain.parameter"() {sources = ["w"], recipe = []} : () -> tensor<8x32xf32>
  %y = "spikingbrain.linear"(%gate, %w) {columns = 8 : i64} : (tensor<?x32xf32>, tensor<8x32xf32>) -> tensor<?x8xf32>
  return %y : tensor<?x8xf32>
}
