// RUN: spikingbrain opt -p raise-embedding %s | filecheck %s
// RUN: spikingbrain opt -p raise-embedding --verify-diagnostics %s

!ids = !torch.vtensor<[1,?],si64>
!table = !torch.vtensor<[10,4],f32>
!rows = !torch.vtensor<[1,?,4],f32>

// A look-up in a stored table.
// CHECK-LABEL: func.func @stored(
func.func @stored(%ids: !ids) -> !rows {
  %minus = torch.constant.int -1
  %false = torch.constant.bool false
  %stored = "spikingbrain.parameter"() {sources = ["embedding.weight"], recipe = []} : () -> tensor<10x4xf32>
  %table = torch_c.from_builtin_tensor %stored : tensor<10x4xf32> -> !table
  // CHECK:         "spikingbrain.embedding"({{.*}}) {rows = 10 : i64} : (tensor<1x?xi64>, tensor<10x4xf32>) -> tensor<1x?x4xf32>
  // CHECK-NOT:     torch.aten.embedding
  // CHECK:         return
  %y = torch.aten.embedding %table, %ids, %minus, %false, %false
      : !table, !ids, !torch.int, !torch.bool, !torch.bool -> !rows
  return %y : !rows
}

// A table that the model computes.
// CHECK-LABEL: func.func @computed(
// CHECK-NOT:     spikingbrain.embedding
func.func @computed(%ids: !ids, %table: !table) -> !rows {
  %minus = torch.constant.int -1
  %false = torch.constant.bool false
  // expected-remark@+1 {{raise-embedding: the table is computed by the model, not stored}}
  %y = torch.aten.embedding %table, %ids, %minus, %false, %false
      : !table, !ids, !torch.int, !torch.bool, !torch.bool -> !rows
  return %y : !rows
}

// 32-bit ids.
// CHECK-LABEL: func.func @small_ids(
// CHECK-NOT:     spikingbrain.embedding
func.func @small_ids(%ids: !torch.vtensor<[1,?],si32>) -> !rows {
  %minus = torch.constant.int -1
  %false = torch.constant.bool false
  %stored = "spikingbrain.parameter"() {sources = ["embedding.weight"], recipe = []} : () -> tensor<10x4xf32>
  %table = torch_c.from_builtin_tensor %stored : tensor<10x4xf32> -> !table
  // expected-remark@+1 {{raise-embedding: only tables of floats or int8 with int64 ids are raised}}
  %y = torch.aten.embedding %table, %ids, %minus, %false, %false
      : !table, !torch.vtensor<[1,?],si32>, !torch.int, !torch.bool, !torch.bool -> !rows
  return %y : !rows
}

// A table of codes.
// CHECK-LABEL: func.func @codes(
func.func @codes(%ids: !ids) -> !torch.vtensor<[1,?,4],si8> {
  %minus = torch.constant.int -1
  %false = torch.constant.bool false
  %stored = "spikingbrain.parameter"() {sources = ["codes"], recipe = []} : () -> tensor<10x4xi8>
  %table = torch_c.from_builtin_tensor %stored : tensor<10x4xi8> -> !torch.vtensor<[10,4],si8>
  // CHECK:         "spikingbrain.embedding"({{.*}}) {rows = 10 : i64} : (tensor<1x?xi64>, tensor<10x4xi8>) -> tensor<1x?x4xi8>
  %y = torch.aten.embedding %table, %ids, %minus, %false, %false
      : !torch.vtensor<[10,4],si8>, !ids, !torch.int, !torch.bool, !torch.bool -> !torch.vtensor<[1,?,4],si8>
  return %y : !torch.vtensor<[1,?,4],si8>
}
