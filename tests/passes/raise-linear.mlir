// RUN: spikingbrain opt -p raise-linear %s | filecheck %s
// RUN: spikingbrain opt -p raise-linear --target maca %s | filecheck %s --check-prefix=WAVES
// RUN: spikingbrain opt -p raise-linear --verify-diagnostics %s

!x = !torch.vtensor<[1,?,4],f32>
!y = !torch.vtensor<[1,?,6],f32>
!w = !torch.vtensor<[6,4],f32>

// A stored weight, no bias.
// CHECK-LABEL: func.func @stored(
// CHECK-SAME:      %[[X:[a-z0-9]+]]:
func.func @stored(%x: !x) -> !y {
  %none = torch.constant.none
  %stored = "spikingbrain.parameter"() {sources = ["q.weight"], recipe = []} : () -> tensor<6x4xf32>
  %w = torch_c.from_builtin_tensor %stored : tensor<6x4xf32> -> !w
  // CHECK:         %[[XB:.+]] = torch_c.to_builtin_tensor %[[X]]
  // CHECK:         %[[WB:.+]] = torch_c.to_builtin_tensor
  // CHECK:         %[[Y:.+]] = "spikingbrain.linear"(%[[XB]], %[[WB]]) {columns = 6 : i64} : (tensor<1x?x4xf32>, tensor<6x4xf32>) -> tensor<1x?x6xf32>
  // CHECK:         %[[YT:.+]] = torch_c.from_builtin_tensor %[[Y]]
  // CHECK-NOT:     torch.aten.linear
  // CHECK:         return %[[YT]]
  %y = torch.aten.linear %x, %w, %none : !x, !w, !torch.none -> !y
  return %y : !y
}

// A bias stays a torch add.
// CHECK-LABEL: func.func @with_bias(
// CHECK-SAME:      %[[BIAS:[a-z0-9]+]]: !torch.vtensor<[6],f32>
func.func @with_bias(%x: !x, %bias: !torch.vtensor<[6],f32>) -> !y {
  %stored = "spikingbrain.parameter"() {sources = ["q.weight"], recipe = []} : () -> tensor<6x4xf32>
  %w = torch_c.from_builtin_tensor %stored : tensor<6x4xf32> -> !w
  // CHECK:         %[[Y:.+]] = "spikingbrain.linear"
  // CHECK:         %[[YT:.+]] = torch_c.from_builtin_tensor %[[Y]]
  // CHECK:         %[[SUM:.+]] = torch.aten.add.Tensor %[[YT]], %[[BIAS]], %{{.+}}
  // CHECK:         return %[[SUM]]
  %y = torch.aten.linear %x, %w, %bias : !x, !w, !torch.vtensor<[6],f32> -> !y
  return %y : !y
}

// A weight that comes from outside cannot be packed in advance.
// CHECK-LABEL: func.func @computed(
// CHECK-NOT:     spikingbrain.linear
func.func @computed(%x: !x, %w: !w) -> !y {
  %none = torch.constant.none
  // expected-remark@+1 {{raise-linear: the weight is computed by the model, not stored}}
  %y = torch.aten.linear %x, %w, %none : !x, !w, !torch.none -> !y
  return %y : !y
}

// A weight that is a vector.
// CHECK-LABEL: func.func @vector(
// CHECK-NOT:     spikingbrain.linear
func.func @vector(%x: !x) -> !torch.vtensor<[1,?],f32> {
  %none = torch.constant.none
  %stored = "spikingbrain.parameter"() {sources = ["q.weight"], recipe = []} : () -> tensor<4xf32>
  %w = torch_c.from_builtin_tensor %stored : tensor<4xf32> -> !torch.vtensor<[4],f32>
  // expected-remark@+1 {{raise-linear: the weight is not a matrix or the input has no rank}}
  %y = torch.aten.linear %x, %w, %none : !x, !torch.vtensor<[4],f32>, !torch.none -> !torch.vtensor<[1,?],f32>
  return %y : !torch.vtensor<[1,?],f32>
}

// Weights of 16 bits have kernels where those of f32 have.
// CHECK-LABEL: func.func @half(
// CHECK:         "spikingbrain.linear"(%{{.+}}, %{{.+}}) {columns = 6 : i64} : (tensor<1x4xf16>, tensor<6x4xf16>) -> tensor<1x6xf16>
// WAVES-LABEL: func.func @half(
// WAVES:         "spikingbrain.linear"(%{{.+}}, %{{.+}}) {columns = 6 : i64} : (tensor<1x4xf16>, tensor<6x4xf16>) -> tensor<1x6xf16>
func.func @half(%x: !torch.vtensor<[1,4],f16>) -> !torch.vtensor<[1,6],f16> {
  %none = torch.constant.none
  %stored = "spikingbrain.parameter"() {sources = ["q.weight"], recipe = []} : () -> tensor<6x4xf16>
  %w = torch_c.from_builtin_tensor %stored : tensor<6x4xf16> -> !torch.vtensor<[6,4],f16>
  %y = torch.aten.linear %x, %w, %none
      : !torch.vtensor<[1,4],f16>, !torch.vtensor<[6,4],f16>, !torch.none -> !torch.vtensor<[1,6],f16>
  return %y : !torch.vtensor<[1,6],f16>
}

// Double precision has none.
// CHECK-LABEL: func.func @double(
// CHECK-NOT:     spikingbrain.linear
func.func @double(%x: !torch.vtensor<[1,4],f64>) -> !torch.vtensor<[1,6],f64> {
  %none = torch.constant.none
  %stored = "spikingbrain.parameter"() {sources = ["q.weight"], recipe = []} : () -> tensor<6x4xf64>
  %w = torch_c.from_builtin_tensor %stored : tensor<6x4xf64> -> !torch.vtensor<[6,4],f64>
  // expected-remark@+1 {{raise-linear: element type f64; only f32, f16 and bf16 have kernels}}
  %y = torch.aten.linear %x, %w, %none
      : !torch.vtensor<[1,4],f64>, !torch.vtensor<[6,4],f64>, !torch.none -> !torch.vtensor<[1,6],f64>
  return %y : !torch.vtensor<[1,6],f64>
}
