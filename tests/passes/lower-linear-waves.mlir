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
