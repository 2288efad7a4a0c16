// RUN: spikingbrain opt -p lower-grouped-linear --target maca %s | filecheck %s

// Any number of rows: a launch for few, unsorted; many are sorted by expert into tiles, once for both products.
// CHECK-LABEL: func.func @any_rows(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: tensor<?x4xf32>, %[[V:[a-z0-9]+]]: {{[^,]+}}, %[[W:[a-z0-9]+]]: {{[^,]+}}, %[[E:[a-z0-9]+]]:
func.func @any_rows(%x: tensor<?x4xf32>, %v: tensor<3x40x4xf32>, %w: tensor<3x40x4xf32>, %e: tensor<?xi64>)
    -> (tensor<?x40xf32>, tensor<?x40xf32>) {
  // CHECK:         "spikingbrain_control.launch"({{.*}}%[[X]], %[[V]], %[[E]]{{.*}}) {callee = @[[FEW:grouped_linear_f32_k4_n40_m_e3_few]], tied = [-1]}
  // CHECK:         %[[G:.+]]:2 = "spikingbrain_control.launch"({{.*}}%[[E]]{{.*}}) {callee = @[[SORT:group_rows_n3_t64_m]], tied = [-1, -1]}
  // CHECK:         "spikingbrain_control.launch"({{.*}}%[[X]], %[[V]], %[[G]]#0, %[[G]]#1{{.*}}) {callee = @[[MANY:grouped_linear_f32_k4_n40_m_e3_many]], tied = [4]}
  // CHECK:         "spikingbrain_control.launch"({{.*}}%[[X]], %[[W]], %[[E]]{{.*}}) {callee = @[[FEW]], tied = [-1]}
  // CHECK-NOT:     callee = @[[SORT]]
  // CHECK:         "spikingbrain_control.launch"({{.*}}%[[X]], %[[W]], %[[G]]#0, %[[G]]#1{{.*}}) {callee = @[[MANY]], tied = [4]}
  %y = "spikingbrain.grouped_linear"(%x, %v, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x40x4xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  %z = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x40x4xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return %y, %z : tensor<?x40xf32>, tensor<?x40xf32>
}

// A few rows read the weights of their experts unsorted.
// CHECK-LABEL: func.func @few(
// CHECK-NOT:     callee = @group_rows
// CHECK:         callee = @grouped_linear_f32_k4_n40_m2_e3
func.func @few(%x: tensor<2x4xf32>, %w: tensor<3x40x4xf32>, %e: tensor<2xi64>) -> tensor<2x40xf32> {
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<2x4xf32>, tensor<3x40x4xf32>, tensor<2xi64>) -> tensor<2x40xf32>
  return %y : tensor<2x40xf32>
}

// More experts than a block can sort by: gathering sums in linalg.
// CHECK-LABEL: func.func @many_experts(
// CHECK-NOT:     launch
// CHECK:         linalg.generic
func.func @many_experts(%x: tensor<?x4xf32>, %w: tensor<2000x3x4xf32>, %e: tensor<?xi64>) -> tensor<?x3xf32> {
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 3 : i64} : (tensor<?x4xf32>, tensor<2000x3x4xf32>, tensor<?xi64>) -> tensor<?x3xf32>
  return %y : tensor<?x3xf32>
}
