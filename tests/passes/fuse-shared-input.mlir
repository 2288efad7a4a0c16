// RUN: spikingbrain opt -p fuse-shared-input %s | filecheck %s

// Query, key and value read one input: one projection, its weight stored as one, three slices.
// CHECK-LABEL: func.func @query_key_value(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: tensor<1x?x4xf32>)
func.func @query_key_value(%x: tensor<1x?x4xf32>) -> (tensor<1x?x4xf32>, tensor<1x?x2xf32>, tensor<1x?x2xf32>) {
  %q = "spikingbrain.parameter"() {sources = ["q"], recipe = []} : () -> tensor<4x4xf32>
  %k = "spikingbrain.parameter"() {sources = ["k"], recipe = []} : () -> tensor<2x4xf32>
  %v = "spikingbrain.parameter"() {sources = ["v"], recipe = []} : () -> tensor<2x4xf32>
  // CHECK:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["concat axis=0"], sources = ["q", "k", "v"]} : () -> tensor<8x4xf32>
  // CHECK:         %[[Y:.+]] = "spikingbrain.linear"(%[[X]], %[[W]]) {columns = 8 : i64}
  // CHECK:         %[[T:.+]] = tensor.dim %[[X]], %c1
  // CHECK:         %[[A:.+]] = tensor.extract_slice %[[Y]][0, 0, 0] [1, %[[T]], 4] [1, 1, 1]
  // CHECK:         %[[B:.+]] = tensor.extract_slice %[[Y]][0, 0, 4] [1, %[[T]], 2] [1, 1, 1]
  // CHECK:         %[[C:.+]] = tensor.extract_slice %[[Y]][0, 0, 6] [1, %[[T]], 2] [1, 1, 1]
  // CHECK-NOT:     spikingbrain.linear
  // CHECK:         return %[[A]], %[[B]], %[[C]]
  %a = "spikingbrain.linear"(%x, %q) {columns = 4 : i64} : (tensor<1x?x4xf32>, tensor<4x4xf32>) -> tensor<1x?x4xf32>
  %b = "spikingbrain.linear"(%x, %k) {columns = 2 : i64} : (tensor<1x?x4xf32>, tensor<2x4xf32>) -> tensor<1x?x2xf32>
  %c = "spikingbrain.linear"(%x, %v) {columns = 2 : i64} : (tensor<1x?x4xf32>, tensor<2x4xf32>) -> tensor<1x?x2xf32>
  return %a, %b, %c : tensor<1x?x4xf32>, tensor<1x?x2xf32>, tensor<1x?x2xf32>
}

// A result that is used before the last projection: its slice stands at the first one, ahead of every use.
// CHECK-LABEL: func.func @used_between(
func.func @used_between(%x: tensor<3x4xf32>) -> tensor<3x2xf32> {
  %k = "spikingbrain.parameter"() {sources = ["k"], recipe = []} : () -> tensor<2x4xf32>
  %v = "spikingbrain.parameter"() {sources = ["v"], recipe = []} : () -> tensor<2x4xf32>
  // CHECK:         %[[Y:.+]] = "spikingbrain.linear"
  // CHECK:         %[[A:.+]] = tensor.extract_slice %[[Y]][0, 0] [3, 2] [1, 1]
  // CHECK:         %[[B:.+]] = tensor.extract_slice %[[Y]][0, 2] [3, 2] [1, 1]
  // CHECK:         %[[SQUARE:.+]] = arith.mulf %[[A]], %[[A]]
  // CHECK:         arith.addf %[[SQUARE]], %[[B]]
  %a = "spikingbrain.linear"(%x, %k) {columns = 2 : i64} : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<3x2xf32>
  %square = arith.mulf %a, %a : tensor<3x2xf32>
  %b = "spikingbrain.linear"(%x, %v) {columns = 2 : i64} : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<3x2xf32>
  %sum = arith.addf %square, %b : tensor<3x2xf32>
  return %sum : tensor<3x2xf32>
}

// Different inputs.
// CHECK-LABEL: func.func @other_input(
// CHECK-NOT:     concat
// CHECK-COUNT-2: "spikingbrain.linear"
func.func @other_input(%x: tensor<3x4xf32>, %z: tensor<3x4xf32>) -> (tensor<3x2xf32>, tensor<3x2xf32>) {
  %k = "spikingbrain.parameter"() {sources = ["k"], recipe = []} : () -> tensor<2x4xf32>
  %v = "spikingbrain.parameter"() {sources = ["v"], recipe = []} : () -> tensor<2x4xf32>
  %a = "spikingbrain.linear"(%x, %k) {columns = 2 : i64} : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<3x2xf32>
  %b = "spikingbrain.linear"(%z, %v) {columns = 2 : i64} : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<3x2xf32>
  return %a, %b : tensor<3x2xf32>, tensor<3x2xf32>
}

// A weight that is not stored, and one that has a layout already.
// CHECK-LABEL: func.func @other_weights(
// CHECK-NOT:     concat
// CHECK-COUNT-3: "spikingbrain.linear"
func.func @other_weights(%x: tensor<3x4xf32>, %w: tensor<2x4xf32>) -> (tensor<3x2xf32>, tensor<3x2xf32>, tensor<3x2xf32>) {
  %k = "spikingbrain.parameter"() {sources = ["k"], recipe = []} : () -> tensor<2x4xf32>
  %v = "spikingbrain.parameter"() {sources = ["v"], recipe = ["transpose"]} : () -> tensor<2x4xf32>
  %a = "spikingbrain.linear"(%x, %k) {columns = 2 : i64} : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<3x2xf32>
  %b = "spikingbrain.linear"(%x, %v) {columns = 2 : i64} : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<3x2xf32>
  %c = "spikingbrain.linear"(%x, %w) {columns = 2 : i64} : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<3x2xf32>
  return %a, %b, %c : tensor<3x2xf32>, tensor<3x2xf32>, tensor<3x2xf32>
}

// One of the two is computed in a branch only.
// CHECK-LABEL: func.func @other_block(
// CHECK-NOT:     concat
func.func @other_block(%x: tensor<3x4xf32>, %more: i1) -> tensor<3x2xf32> {
  %k = "spikingbrain.parameter"() {sources = ["k"], recipe = []} : () -> tensor<2x4xf32>
  %v = "spikingbrain.parameter"() {sources = ["v"], recipe = []} : () -> tensor<2x4xf32>
  %a = "spikingbrain.linear"(%x, %k) {columns = 2 : i64} : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<3x2xf32>
  %y = scf.if %more -> tensor<3x2xf32> {
    %b = "spikingbrain.linear"(%x, %v) {columns = 2 : i64} : (tensor<3x4xf32>, tensor<2x4xf32>) -> tensor<3x2xf32>
    scf.yield %b : tensor<3x2xf32>
  } else {
    scf.yield %a : tensor<3x2xf32>
  }
  return %y : tensor<3x2xf32>
}
