// RUN: spikingbrain opt -p lower-grouped-linear --target x86-64-v3 %s | filecheck %s

// Any number of rows: they are sorted once for both products, and a workgroup takes those of one expert.
// CHECK-DAG:   func.func private @[[KERNEL:grouped_linear_e3_k4_n40_m]](
// CHECK-DAG:   func.func private @[[SORT:group_rows_n3_m]](
// CHECK-LABEL: func.func @packed(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: tensor<?x4xf32>, %[[V:[a-z0-9]+]]: {{[^,]+}}, %[[W:[a-z0-9]+]]: {{[^,]+}}, %[[E:[a-z0-9]+]]:
func.func @packed(%x: tensor<?x4xf32>, %v: tensor<3x3x4x16xf32>, %w: tensor<3x3x4x16xf32>, %e: tensor<?xi64>) -> (tensor<?x40xf32>, tensor<?x40xf32>) {
  // CHECK:         %[[G:.+]]:3 = "spikingbrain_control.launch"({{.*}}%[[E]]{{.*}}) {callee = @[[SORT]], tied = [-1, -1, -1]}
  // CHECK:         %[[Y:.+]] = "spikingbrain_control.launch"({{.*}}%[[X]], %[[V]], %[[G]]#0, %[[G]]#1{{.*}}) {callee = @[[KERNEL]], tied = [-1]}
  // CHECK-NOT:     callee = @[[SORT]]
  // CHECK:         %[[Z:.+]] = "spikingbrain_control.launch"({{.*}}%[[X]], %[[W]], %[[G]]#0, %[[G]]#1{{.*}}) {callee = @[[KERNEL]], tied = [-1]}
  // CHECK:         return %[[Y]], %[[Z]]
  %y = "spikingbrain.grouped_linear"(%x, %v, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x3x4x16xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  %z = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x3x4x16xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return %y, %z : tensor<?x40xf32>, tensor<?x40xf32>
}

// Few rows are not sorted.
// CHECK-LABEL: func.func @few(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: tensor<2x4xf32>, %[[W:[a-z0-9]+]]: {{[^,]+}}, %[[E:[a-z0-9]+]]:
func.func @few(%x: tensor<2x4xf32>, %w: tensor<3x3x4x16xf32>, %e: tensor<2xi64>) -> tensor<2x40xf32> {
  // CHECK-NOT:     group_rows
  // CHECK:         %[[Y:.+]] = "spikingbrain_control.launch"({{.*}}%[[X]], %[[W]], %[[E]]) {callee = @grouped_linear_e3_k4_n40_m2, tied = [-1]}
  // CHECK:         return %[[Y]]
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<2x4xf32>, tensor<3x3x4x16xf32>, tensor<2xi64>) -> tensor<2x40xf32>
  return %y : tensor<2x40xf32>
}

// A plain weight is read where a sum needs it, never gathered.
// CHECK-LABEL: func.func @plain(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: tensor<?x4xf32>, %[[W:[a-z0-9]+]]: {{[^,]+}}, %[[E:[a-z0-9]+]]:
// CHECK:         %[[INIT:.+]] = linalg.fill {{.*}} -> tensor<?x40xf32>
// CHECK:         linalg.generic {{.*}}iterator_types = ["parallel", "parallel", "reduction"]{{.*}}ins(%[[X]], %[[E]] : tensor<?x4xf32>, tensor<?xi64>) outs(%[[INIT]]
// CHECK:           tensor.extract %[[W]]
// CHECK:           arith.mulf
// CHECK:           arith.addf
func.func @plain(%x: tensor<?x4xf32>, %w: tensor<3x40x4xf32>, %e: tensor<?xi64>) -> tensor<?x40xf32> {
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x40x4xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return %y : tensor<?x40xf32>
}

// Half floats are summed as f32.
// CHECK-LABEL: func.func @half(
// CHECK:         linalg.fill {{.*}} -> tensor<2x40xf32>
// CHECK:           arith.extf
// CHECK:           arith.addf %{{.+}} : f32
// CHECK:           arith.truncf %{{.+}} : f32 to bf16
func.func @half(%x: tensor<2x4xbf16>, %w: tensor<3x40x4xbf16>, %e: tensor<2xi64>) -> tensor<2x40xbf16> {
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<2x4xbf16>, tensor<3x40x4xbf16>, tensor<2xi64>) -> tensor<2x40xbf16>
  return %y : tensor<2x40xbf16>
}

// Spike counts: products of integers, each code read where a sum needs it; then scales and the threshold.
// CHECK-LABEL: func.func @spikes(
// CHECK-SAME:      %[[C:[a-z0-9]+]]: {{[^,]+}}, %[[V:[a-z0-9]+]]: {{[^,]+}}, %[[W:[a-z0-9]+]]: {{[^,]+}}, %[[S:[a-z0-9]+]]: {{[^,]+}}, %[[E:[a-z0-9]+]]:
// CHECK:         %[[CODES:.+]] = tensor.expand_shape %[[W]] {{.*}} into tensor<3x40x2x4xi8>
// CHECK:         tensor.extract %[[CODES]]
// CHECK:         arith.muli %{{.+}} : i32
// CHECK:         tensor.extract %[[S]]
// CHECK-NOT:     tensor<?x40x2x4
func.func @spikes(%c: tensor<?x8xf32>, %v: tensor<?xf32>, %w: tensor<3x40x8xi8>, %s: tensor<3x40x2xf32>, %e: tensor<?xi64>) -> tensor<?x40xf32> {
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {bits = 8 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<3x40x8xi8>, tensor<3x40x2xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return %y : tensor<?x40xf32>
}
