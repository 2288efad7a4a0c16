// RUN: spikingbrain opt -p fuse-shared-input %s | filecheck %s
// RUN: spikingbrain opt -p fuse-shared-input --target maca %s | filecheck %s --check-prefix=WAVES

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

// Projections of spikes, each with a neuron of its own on one input: joined where launches cost; not one of another threshold.
// CHECK-LABEL: func.func @spikes(
// CHECK-COUNT-3: "spikingbrain.spike_linear"
// WAVES-LABEL: func.func @spikes(
// WAVES:         %[[C:[0-9]+]]:2 = "spikingbrain.spike_encode"
// WAVES:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["codes bits=8", "concat axis=0"], sources = ["a", "as", "b", "bs"]} : () -> tensor<5x4xi8>
// WAVES:         %[[S:.+]] = "spikingbrain.parameter"() {recipe = ["column", "concat axis=0"], sources = ["as", "bs"]} : () -> tensor<5x1xf32>
// WAVES:         %[[Y:.+]] = "spikingbrain.spike_linear"(%[[C]]#0, %[[C]]#1, %[[W]], %[[S]]) {bits = 8 : i64}
// WAVES:         tensor.extract_slice %[[Y]][0, 0] [3, 3] [1, 1]
// WAVES:         tensor.extract_slice %[[Y]][0, 3] [3, 2] [1, 1]
// WAVES:         "spikingbrain.spike_linear"
// WAVES-NOT:     "spikingbrain.spike_linear"
func.func @spikes(%x: tensor<3x4xf32>) -> (tensor<3x3xf32>, tensor<3x2xf32>, tensor<3x2xf32>) {
  %a = "spikingbrain.parameter"() {sources = ["a", "as"], recipe = ["codes bits=8"]} : () -> tensor<3x4xi8>
  %as = "spikingbrain.parameter"() {sources = ["as"], recipe = ["column"]} : () -> tensor<3x1xf32>
  %b = "spikingbrain.parameter"() {sources = ["b", "bs"], recipe = ["codes bits=8"]} : () -> tensor<2x4xi8>
  %bs = "spikingbrain.parameter"() {sources = ["bs"], recipe = ["column"]} : () -> tensor<2x1xf32>
  %c0, %v0 = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64} : (tensor<3x4xf32>) -> (tensor<3x4xf32>, tensor<3xf32>)
  %c1, %v1 = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64} : (tensor<3x4xf32>) -> (tensor<3x4xf32>, tensor<3xf32>)
  %c2, %v2 = "spikingbrain.spike_encode"(%x) {k = 2.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64} : (tensor<3x4xf32>) -> (tensor<3x4xf32>, tensor<3xf32>)
  %p = "spikingbrain.spike_linear"(%c0, %v0, %a, %as) {bits = 8 : i64} : (tensor<3x4xf32>, tensor<3xf32>, tensor<3x4xi8>, tensor<3x1xf32>) -> tensor<3x3xf32>
  %q = "spikingbrain.spike_linear"(%c1, %v1, %b, %bs) {bits = 8 : i64} : (tensor<3x4xf32>, tensor<3xf32>, tensor<2x4xi8>, tensor<2x1xf32>) -> tensor<3x2xf32>
  %r = "spikingbrain.spike_linear"(%c2, %v2, %b, %bs) {bits = 8 : i64} : (tensor<3x4xf32>, tensor<3xf32>, tensor<2x4xi8>, tensor<2x1xf32>) -> tensor<3x2xf32>
  return %p, %q, %r : tensor<3x3xf32>, tensor<3x2xf32>, tensor<3x2xf32>
}

// One with a bias and one without: the biases are the first columns.
// WAVES-LABEL: func.func @a_bias(
// WAVES:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["concat axis=0"], sources = ["b", "a"]} : () -> tensor<5x4xi8>
// WAVES:         %[[B:.+]] = "spikingbrain.parameter"() {recipe = ["concat axis=0", "lengthen to=5"], sources = ["bias"]} : () -> tensor<5xf32>
// WAVES:         %[[Y:.+]] = "spikingbrain.spike_linear"(%{{.+}}, %{{.+}}, %[[W]], %{{.+}}, %[[B]]) {bits = 8 : i64}
// WAVES:         tensor.extract_slice %[[Y]][0, 0] [3, 2] [1, 1]
// WAVES:         tensor.extract_slice %[[Y]][0, 2] [3, 3] [1, 1]
func.func @a_bias(%x: tensor<3x4xf32>) -> (tensor<3x3xf32>, tensor<3x2xf32>) {
  %a = "spikingbrain.parameter"() {sources = ["a"], recipe = []} : () -> tensor<3x4xi8>
  %as = "spikingbrain.parameter"() {sources = ["as"], recipe = []} : () -> tensor<3x1xf32>
  %b = "spikingbrain.parameter"() {sources = ["b"], recipe = []} : () -> tensor<2x4xi8>
  %bs = "spikingbrain.parameter"() {sources = ["bs"], recipe = []} : () -> tensor<2x1xf32>
  %bias = "spikingbrain.parameter"() {sources = ["bias"], recipe = []} : () -> tensor<2xf32>
  %c, %v = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64} : (tensor<3x4xf32>) -> (tensor<3x4xf32>, tensor<3xf32>)
  %p = "spikingbrain.spike_linear"(%c, %v, %a, %as) {bits = 8 : i64} : (tensor<3x4xf32>, tensor<3xf32>, tensor<3x4xi8>, tensor<3x1xf32>) -> tensor<3x3xf32>
  %q = "spikingbrain.spike_linear"(%c, %v, %b, %bs, %bias) {bits = 8 : i64} : (tensor<3x4xf32>, tensor<3xf32>, tensor<2x4xi8>, tensor<2x1xf32>, tensor<2xf32>) -> tensor<3x2xf32>
  return %p, %q : tensor<3x3xf32>, tensor<3x2xf32>
}

// Projections by experts: joined for waves by the columns of each expert; not those of rows that go other ways.
// CHECK-LABEL: func.func @experts(
// CHECK-COUNT-3: "spikingbrain.grouped_linear"
// WAVES-LABEL: func.func @experts(
// WAVES:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["concat axis=1"], sources = ["a", "b"]} : () -> tensor<2x5x4xf32>
// WAVES:         %[[Y:.+]] = "spikingbrain.grouped_linear"(%{{.+}}, %[[W]], %{{.+}}) {columns = 5 : i64}
// WAVES:         tensor.extract_slice %[[Y]][0, 0] [7, 3] [1, 1]
// WAVES:         tensor.extract_slice %[[Y]][0, 3] [7, 2] [1, 1]
// WAVES:         "spikingbrain.grouped_linear"
// WAVES-NOT:     "spikingbrain.grouped_linear"
func.func @experts(%x: tensor<7x4xf32>, %e: tensor<7xi64>, %f: tensor<7xi64>) -> (tensor<7x3xf32>, tensor<7x2xf32>, tensor<7x2xf32>) {
  %a = "spikingbrain.parameter"() {sources = ["a"], recipe = []} : () -> tensor<2x3x4xf32>
  %b = "spikingbrain.parameter"() {sources = ["b"], recipe = []} : () -> tensor<2x2x4xf32>
  %p = "spikingbrain.grouped_linear"(%x, %a, %e) {columns = 3 : i64} : (tensor<7x4xf32>, tensor<2x3x4xf32>, tensor<7xi64>) -> tensor<7x3xf32>
  %q = "spikingbrain.grouped_linear"(%x, %b, %e) {columns = 2 : i64} : (tensor<7x4xf32>, tensor<2x2x4xf32>, tensor<7xi64>) -> tensor<7x2xf32>
  %r = "spikingbrain.grouped_linear"(%x, %b, %f) {columns = 2 : i64} : (tensor<7x4xf32>, tensor<2x2x4xf32>, tensor<7xi64>) -> tensor<7x2xf32>
  return %p, %q, %r : tensor<7x3xf32>, tensor<7x2xf32>, tensor<7x2xf32>
}
