// RUN: spikingbrain opt -p raise-grouped-linear %s | filecheck %s
// RUN: spikingbrain opt -p raise-grouped-linear --verify-diagnostics %s

!x = !torch.vtensor<[?,4],f32>
!y = !torch.vtensor<[?,6],f32>
!e = !torch.vtensor<[?],si64>

// Stored weights [N, O, K].
// CHECK-LABEL: func.func @stored(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: {{.+}}, %[[E:[a-z0-9]+]]:
func.func @stored(%x: !x, %e: !e) -> !y {
  %false = torch.constant.bool false
  %stored = "spikingbrain.parameter"() {sources = ["experts"], recipe = []} : () -> tensor<3x6x4xf32>
  %w = torch_c.from_builtin_tensor %stored : tensor<3x6x4xf32> -> !torch.vtensor<[3,6,4],f32>
  // CHECK:         %[[W:.+]] = "spikingbrain.parameter"
  // CHECK:         %[[XB:.+]] = torch_c.to_builtin_tensor %[[X]]
  // CHECK:         %[[EB:.+]] = torch_c.to_builtin_tensor %[[E]]
  // CHECK:         %[[Y:.+]] = "spikingbrain.grouped_linear"(%[[XB]], %[[W]], %[[EB]]) {columns = 6 : i64} : (tensor<?x4xf32>, tensor<3x6x4xf32>, tensor<?xi64>) -> tensor<?x6xf32>
  // CHECK:         %[[YT:.+]] = torch_c.from_builtin_tensor %[[Y]]
  // CHECK:         return %[[YT]]
  %y = torch.operator "torch.spikingbrain.grouped_linear"(%x, %w, %e, %false) : (!x, !torch.vtensor<[3,6,4],f32>, !e, !torch.bool) -> !y
  return %y : !y
}

// Those that the model stores as [N, K, O] are turned round by their recipe.
// CHECK-LABEL: func.func @transposed(
func.func @transposed(%x: !x, %e: !e) -> !y {
  %true = torch.constant.bool true
  %stored = "spikingbrain.parameter"() {sources = ["experts"], recipe = []} : () -> tensor<3x4x6xf32>
  %w = torch_c.from_builtin_tensor %stored : tensor<3x4x6xf32> -> !torch.vtensor<[3,4,6],f32>
  // CHECK:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["transpose"], sources = ["experts"]} : () -> tensor<3x6x4xf32>
  // CHECK:         "spikingbrain.grouped_linear"(%{{.+}}, %[[W]], %{{.+}})
  %y = torch.operator "torch.spikingbrain.grouped_linear"(%x, %w, %e, %true) : (!x, !torch.vtensor<[3,4,6],f32>, !e, !torch.bool) -> !y
  return %y : !y
}

// What comes from outside has no recipe: it is transposed by the program.
// CHECK-LABEL: func.func @transposed_argument(
func.func @transposed_argument(%x: !x, %w: !torch.vtensor<[3,4,6],f32>, %e: !e) -> !y {
  %true = torch.constant.bool true
  // CHECK:         %[[W:.+]] = linalg.transpose ins(%{{.+}} : tensor<3x4x6xf32>) outs(%{{.+}} : tensor<3x6x4xf32>) permutation = [0, 2, 1]
  // CHECK:         "spikingbrain.grouped_linear"(%{{.+}}, %[[W]], %{{.+}})
  %y = torch.operator "torch.spikingbrain.grouped_linear"(%x, %w, %e, %true) : (!x, !torch.vtensor<[3,4,6],f32>, !e, !torch.bool) -> !y
  return %y : !y
}

// The number of columns is part of the op.
// CHECK-LABEL: func.func @unknown_size(
// CHECK-NOT:     spikingbrain.grouped_linear"(%{{.+}}columns
func.func @unknown_size(%x: !x, %w: !torch.vtensor<[3,?,4],f32>, %e: !e) -> !torch.vtensor<[?,?],f32> {
  %false = torch.constant.bool false
  // expected-remark@+1 {{raise-grouped-linear: weights of unknown size}}
  %y = torch.operator "torch.spikingbrain.grouped_linear"(%x, %w, %e, %false) : (!x, !torch.vtensor<[3,?,4],f32>, !e, !torch.bool) -> !torch.vtensor<[?,?],f32>
  return %y : !torch.vtensor<[?,?],f32>
}

// Spike counts and integer weights.
// CHECK-LABEL: func.func @spikes(
// CHECK-SAME:      %[[C:[a-z0-9]+]]: {{.+}}, %[[V:[a-z0-9]+]]: {{.+}}, %[[E:[a-z0-9]+]]:
func.func @spikes(%c: !x, %v: !torch.vtensor<[?],f32>, %e: !e) -> !y {
  %bits = torch.constant.int 8
  %silent = torch.constant.float 9.000000e-01
  %codes = "spikingbrain.parameter"() {sources = ["codes"], recipe = []} : () -> tensor<3x6x4xi8>
  %scale = "spikingbrain.parameter"() {sources = ["scale"], recipe = []} : () -> tensor<3x6x2xf32>
  %w = torch_c.from_builtin_tensor %codes : tensor<3x6x4xi8> -> !torch.vtensor<[3,6,4],si8>
  %s = torch_c.from_builtin_tensor %scale : tensor<3x6x2xf32> -> !torch.vtensor<[3,6,2],f32>
  // CHECK:         %[[W:.+]] = "spikingbrain.parameter"() {{.*}} -> tensor<3x6x4xi8>
  // CHECK:         %[[S:.+]] = "spikingbrain.parameter"() {{.*}} -> tensor<3x6x2xf32>
  // CHECK:         %[[Y:.+]] = "spikingbrain.spike_grouped_linear"(%{{.+}}, %{{.+}}, %[[W]], %[[S]], %{{.+}}) {bits = 8 : i64, silent = {{.+}} : f64}
  // CHECK:         torch_c.from_builtin_tensor %[[Y]]
  %y = torch.operator "torch.spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e, %bits, %silent)
      : (!x, !torch.vtensor<[?],f32>, !torch.vtensor<[3,6,4],si8>, !torch.vtensor<[3,6,2],f32>, !e, !torch.int, !torch.float) -> !y
  return %y : !y
}

// The experts of other integers.
// CHECK-LABEL: func.func @narrow(
func.func @narrow(%x: !x, %w: !torch.vtensor<[3,6,4],f32>, %e: !torch.vtensor<[?],si32>) -> !y {
  %false = torch.constant.bool false
  // expected-remark@+1 {{raise-grouped-linear: experts of si32; only int64 is raised}}
  %y = torch.operator "torch.spikingbrain.grouped_linear"(%x, %w, %e, %false) : (!x, !torch.vtensor<[3,6,4],f32>, !torch.vtensor<[?],si32>, !torch.bool) -> !y
  return %y : !y
}
