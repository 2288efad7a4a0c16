// RUN: spikingbrain opt -p raise-spikes %s | filecheck %s
// RUN: spikingbrain opt -p raise-spikes --verify-diagnostics %s

!x = !torch.vtensor<[1,?,8],f32>
!v = !torch.vtensor<[1,?],f32>
!y = !torch.vtensor<[1,?,6],f32>
!codes = !torch.vtensor<[6,8],si8>
!w = !torch.vtensor<[6,8],f32>

// CHECK-LABEL: func.func @encode(
// CHECK:         "spikingbrain.spike_encode"(%{{.+}}) {k = 3.000000e+00 : f64, lower = {{.+}} : f64, upper = 1.000000e+04 : f64} : (tensor<1x?x8xf32>) -> (tensor<1x?x8xf32>, tensor<1x?xf32>)
func.func @encode(%x: !x) -> (!x, !v) {
  %k = torch.constant.float 3.0
  %lower = torch.constant.float 1.0e-5
  %upper = torch.constant.float 1.0e4
  %c, %v = torch.operator "torch.spikingbrain.spike_encode"(%x, %k, %lower, %upper) : (!x, !torch.float, !torch.float, !torch.float) -> (!x, !v)
  return %c, %v : !x, !v
}

// Codes as they are stored; the scale of groups loses its last axis.
// CHECK-LABEL: func.func @codes(
// CHECK:         %[[S:.+]] = "spikingbrain.parameter"() {recipe = ["matrix"], sources = ["q.scale"]} : () -> tensor<6x2xf32>
// CHECK:         "spikingbrain.spike_linear"(%{{.+}}, %{{.+}}, %{{.+}}, %[[S]]) {bits = 8 : i64}
func.func @codes(%counts: !x, %v: !v) -> !y {
  %share = torch.constant.float 0.0
  %none = torch.constant.none
  %bits = torch.constant.int 8
  %w0 = "spikingbrain.parameter"() {sources = ["q.codes"], recipe = []} : () -> tensor<6x8xi8>
  %w = torch_c.from_builtin_tensor %w0 : tensor<6x8xi8> -> !codes
  %s0 = "spikingbrain.parameter"() {sources = ["q.scale"], recipe = []} : () -> tensor<6x2x1xf32>
  %s = torch_c.from_builtin_tensor %s0 : tensor<6x2x1xf32> -> !torch.vtensor<[6,2,1],f32>
  %y = torch.operator "torch.spikingbrain.spike_linear"(%counts, %v, %w, %s, %none, %bits, %none, %none, %share) : (!x, !v, !codes, !torch.vtensor<[6,2,1],f32>, !torch.none, !torch.int, !torch.none, !torch.none, !torch.float) -> !y
  return %y : !y
}

// A share of silent channels that someone has measured goes with it.
// CHECK-LABEL: func.func @silent(
// CHECK:         "spikingbrain.spike_linear"(%{{.+}}, %{{.+}}, %{{.+}}, %{{.+}}) {bits = 8 : i64, silent = 9.000000e-01 : f64}
func.func @silent(%counts: !x, %v: !v) -> !y {
  %share = torch.constant.float 0.9
  %none = torch.constant.none
  %bits = torch.constant.int 8
  %w0 = "spikingbrain.parameter"() {sources = ["q.codes"], recipe = []} : () -> tensor<6x8xi8>
  %w = torch_c.from_builtin_tensor %w0 : tensor<6x8xi8> -> !codes
  %s0 = "spikingbrain.parameter"() {sources = ["q.scale"], recipe = []} : () -> tensor<6x1xf32>
  %s = torch_c.from_builtin_tensor %s0 : tensor<6x1xf32> -> !torch.vtensor<[6,1],f32>
  %y = torch.operator "torch.spikingbrain.spike_linear"(%counts, %v, %w, %s, %none, %bits, %none, %none, %share) : (!x, !v, !codes, !torch.vtensor<[6,1],f32>, !torch.none, !torch.int, !torch.none, !torch.none, !torch.float) -> !y
  return %y : !y
}

// Float weights are rounded by their recipe.
// CHECK-LABEL: func.func @floats(
// CHECK:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["codes bits=8"], sources = ["q.weight", "q.scale"]} : () -> tensor<6x8xi8>
// CHECK:         "spikingbrain.spike_linear"(%{{.+}}, %{{.+}}, %[[W]], %{{.+}}, %{{.+}}) {bits = 4 : i64}
func.func @floats(%counts: !x, %v: !v, %bias: !torch.vtensor<[6],f32>) -> !y {
  %share = torch.constant.float 0.0
  %none = torch.constant.none
  %bits = torch.constant.int 4
  %w0 = "spikingbrain.parameter"() {sources = ["q.weight"], recipe = []} : () -> tensor<6x8xf32>
  %w = torch_c.from_builtin_tensor %w0 : tensor<6x8xf32> -> !w
  %s0 = "spikingbrain.parameter"() {sources = ["q.scale"], recipe = []} : () -> tensor<6x1xf32>
  %s = torch_c.from_builtin_tensor %s0 : tensor<6x1xf32> -> !torch.vtensor<[6,1],f32>
  %y = torch.operator "torch.spikingbrain.spike_linear"(%counts, %v, %w, %s, %bias, %bits, %none, %none, %share) : (!x, !v, !w, !torch.vtensor<[6,1],f32>, !torch.vtensor<[6],f32>, !torch.int, !torch.none, !torch.none, !torch.float) -> !y
  return %y : !y
}

// Float weights that the model computes stay as they are.
// CHECK-LABEL: func.func @computed(
// CHECK:         torch.operator "torch.spikingbrain.spike_linear"
func.func @computed(%counts: !x, %v: !v, %w: !w, %s: !torch.vtensor<[6,1],f32>) -> !y {
  %share = torch.constant.float 0.0
  %none = torch.constant.none
  %bits = torch.constant.int 8
  %y = torch.operator "torch.spikingbrain.spike_linear"(%counts, %v, %w, %s, %none, %bits, %none, %none, %share) : (!x, !v, !w, !torch.vtensor<[6,1],f32>, !torch.none, !torch.int, !torch.none, !torch.none, !torch.float) -> !y
  return %y : !y
}
