// RUN: spikingbrain opt -p pack-weights --target x86-64-v3 %s | filecheck %s
// RUN: spikingbrain opt -p pack-weights --target vulkan %s | filecheck %s --check-prefix=PLAIN

// 40 columns in blocks of 16; the last block is half full. Targets without vector kernels keep the matrix.
// CHECK-LABEL: func.func @projection(
// PLAIN-LABEL: func.func @projection(
// PLAIN-NOT:     pack_columns
func.func @projection(%x: tensor<?x4xf32>) -> tensor<?x40xf32> {
  // CHECK:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["concat axis=0", "pack_columns block=16"], sources = ["q", "k"]} : () -> tensor<3x4x16xf32>
  // CHECK:         "spikingbrain.linear"(%{{.+}}, %[[W]]) {columns = 40 : i64}
  %w = "spikingbrain.parameter"() {sources = ["q", "k"], recipe = ["concat axis=0"]} : () -> tensor<40x4xf32>
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<40x4xf32>) -> tensor<?x40xf32>
  return %y : tensor<?x40xf32>
}

// A head tied to the table: both read the packed form, stored once.
// CHECK-LABEL: func.func @tied(
func.func @tied(%ids: tensor<?xi64>) -> tensor<?x32xf32> {
  // CHECK:         %[[T:.+]] = "spikingbrain.parameter"() {recipe = ["pack_columns block=16"], sources = ["table"]} : () -> tensor<2x4x16xf32>
  // CHECK:         "spikingbrain.embedding"(%{{.+}}, %[[T]]) {rows = 32 : i64}
  // CHECK:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["pack_columns block=16"], sources = ["table"]} : () -> tensor<2x4x16xf32>
  // CHECK:         "spikingbrain.linear"(%{{.+}}, %[[W]])
  %w = "spikingbrain.parameter"() {sources = ["table"], recipe = []} : () -> tensor<32x4xf32>
  %x = "spikingbrain.embedding"(%ids, %w) {rows = 32 : i64} : (tensor<?xi64>, tensor<32x4xf32>) -> tensor<?x4xf32>
  %y = "spikingbrain.linear"(%x, %w) {columns = 32 : i64} : (tensor<?x4xf32>, tensor<32x4xf32>) -> tensor<?x32xf32>
  return %y : tensor<?x32xf32>
}

// A table of its own is read row by row and stays; so does a weight that is not stored.
// CHECK-LABEL: func.func @not_packed(
// CHECK-NOT:     pack_columns
// CHECK:         return
func.func @not_packed(%ids: tensor<?xi64>, %w: tensor<40x4xf32>) -> tensor<?x40xf32> {
  %table = "spikingbrain.parameter"() {sources = ["own"], recipe = []} : () -> tensor<32x4xf32>
  %x = "spikingbrain.embedding"(%ids, %table) {rows = 32 : i64} : (tensor<?xi64>, tensor<32x4xf32>) -> tensor<?x4xf32>
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<40x4xf32>) -> tensor<?x40xf32>
  return %y : tensor<?x40xf32>
}

// Weights of experts: each is packed by itself.
// CHECK-LABEL: func.func @experts(
func.func @experts(%x: tensor<?x4xf32>, %e: tensor<?xi64>) -> tensor<?x40xf32> {
  // CHECK:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["transpose", "pack_columns block=16"], sources = ["experts"]} : () -> tensor<5x3x4x16xf32>
  // CHECK:         "spikingbrain.grouped_linear"(%{{.+}}, %[[W]], %{{.+}}) {columns = 40 : i64}
  %w = "spikingbrain.parameter"() {sources = ["experts"], recipe = ["transpose"]} : () -> tensor<5x40x4xf32>
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<5x40x4xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return %y : tensor<?x40xf32>
}

// There are kernels for weights of 16 bits, none for those of f64.
// CHECK-LABEL: func.func @half_experts(
// CHECK:         recipe = ["pack_columns block=16"], sources = ["experts"]} : () -> tensor<5x3x4x16xbf16>
func.func @half_experts(%x: tensor<?x4xbf16>, %e: tensor<?xi64>) -> tensor<?x40xbf16> {
  %w = "spikingbrain.parameter"() {sources = ["experts"], recipe = []} : () -> tensor<5x40x4xbf16>
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xbf16>, tensor<5x40x4xbf16>, tensor<?xi64>) -> tensor<?x40xbf16>
  return %y : tensor<?x40xbf16>
}

// CHECK-LABEL: func.func @double_experts(
// CHECK-NOT:     pack_columns
// CHECK:         return
func.func @double_experts(%x: tensor<?x4xf64>, %e: tensor<?xi64>) -> tensor<?x40xf64> {
  %w = "spikingbrain.parameter"() {sources = ["experts"], recipe = []} : () -> tensor<5x40x4xf64>
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xf64>, tensor<5x40x4xf64>, tensor<?xi64>) -> tensor<?x40xf64>
  return %y : tensor<?x40xf64>
}
