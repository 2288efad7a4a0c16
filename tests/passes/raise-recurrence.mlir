// RUN: spikingbrain opt -p raise-recurrence %s | filecheck %s
// RUN: spikingbrain opt -p raise-recurrence --verify-diagnostics %s

!q = !torch.vtensor<[2,?,4,8],f32>
!k = !torch.vtensor<[2,?,2,8],f32>
!v = !torch.vtensor<[2,?,2,16],f32>
!o = !torch.vtensor<[2,?,4,16],f32>
!s = !torch.vtensor<[2,2,8,16],f32>

// Absent tensors leave the operands, constants become attributes.
// CHECK-LABEL: func.func @plain(
// CHECK-SAME:      %[[Q:[a-z0-9]+]]: {{[^%]+}}, %[[K:[a-z0-9]+]]: {{[^%]+}}, %[[V:[a-z0-9]+]]: {{[^%]+}}, %[[G:[a-z0-9]+]]: {{[^%]+}})
func.func @plain(%q: !q, %k: !k, %v: !v, %g: !k) -> (!o, !s) {
  %none = torch.constant.none
  %axis = torch.constant.str "key"
  %true = torch.constant.bool true
  %false = torch.constant.bool false
  // CHECK-DAG:     %[[BQ:.+]] = torch_c.to_builtin_tensor %[[Q]]
  // CHECK-DAG:     %[[BK:.+]] = torch_c.to_builtin_tensor %[[K]]
  // CHECK-DAG:     %[[BV:.+]] = torch_c.to_builtin_tensor %[[V]]
  // CHECK-DAG:     %[[BG:.+]] = torch_c.to_builtin_tensor %[[G]]
  // CHECK:         %[[R:.+]]:2 = "spikingbrain.linear_recurrence"(%[[BQ]], %[[BK]], %[[BV]], %[[BG]])
  // CHECK-SAME:      decay_axis = "key", exclusive = false, log_decay = true, operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 0, 0, 0>, reverse = true
  // CHECK-SAME:      -> (tensor<2x?x4x16xf32>, tensor<2x2x8x16xf32>)
  // CHECK-DAG:     %[[O:.+]] = torch_c.from_builtin_tensor %[[R]]#0
  // CHECK-DAG:     %[[S:.+]] = torch_c.from_builtin_tensor %[[R]]#1
  // CHECK:         return %[[O]], %[[S]]
  %r:2 = torch.operator "torch.spikingbrain.linear_recurrence"(%q, %k, %v, %g, %none, %none, %none, %none, %axis, %true, %false, %true)
      : (!q, !k, !v, !k, !torch.none, !torch.none, !torch.none, !torch.none, !torch.str, !torch.bool, !torch.bool, !torch.bool) -> (!o, !s)
  return %r#0, %r#1 : !o, !s
}

!hq = !torch.vtensor<[2,?,4,8],bf16>
!hk = !torch.vtensor<[2,?,2,8],bf16>
!hv = !torch.vtensor<[2,?,2,16],bf16>
!ho = !torch.vtensor<[2,?,4,16],bf16>
!hu = !torch.vtensor<[2,8],bf16>

// Half floats are widened, the state is f32 already, the outputs are narrowed.
// CHECK-LABEL: func.func @half(
func.func @half(%q: !hq, %k: !hk, %v: !hv, %u: !hu, %s: !s) -> (!ho, !s) {
  %none = torch.constant.none
  %axis = torch.constant.str "none"
  %true = torch.constant.bool true
  %false = torch.constant.bool false
  // CHECK-COUNT-6: torch.aten.to.dtype {{.+}} -> !torch.vtensor<[{{.+}}],f32>
  // CHECK-NOT:     torch.aten.to.dtype
  // CHECK:         "spikingbrain.linear_recurrence"({{.+}}array<i32: 1, 1, 1, 0, 1, 1, 1, 1>
  // CHECK:         torch.aten.to.dtype {{.+}} -> !torch.vtensor<[2,?,4,16],bf16>
  %r:2 = torch.operator "torch.spikingbrain.linear_recurrence"(%q, %k, %v, %none, %k, %k, %u, %s, %axis, %false, %true, %false)
      : (!hq, !hk, !hv, !torch.none, !hk, !hk, !hu, !s, !torch.str, !torch.bool, !torch.bool, !torch.bool) -> (!ho, !s)
  return %r#0, %r#1 : !ho, !s
}

!x = !torch.vtensor<[1,?,8],f32>
!n = !torch.vtensor<[1,?,4],f32>
!c = !torch.vtensor<[1,8],f32>
!a = !torch.vtensor<[8,4],f32>
!cn = !torch.vtensor<[1,8,4],f32>

// CHECK-LABEL: func.func @scans(
func.func @scans(%x: !x, %b: !n, %a: !a, %h: !c) -> (!x, !cn) {
  %none = torch.constant.none
  %true = torch.constant.bool true
  %false = torch.constant.bool false
  // CHECK:         "spikingbrain.linear_scan"(%{{.+}}, %{{.+}}, %{{.+}}) {log_decay = true, operandSegmentSizes = array<i32: 1, 1, 1>, reverse = false}
  // CHECK:         "spikingbrain.selective_scan"({{.+}}) {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0>, reverse = true}
  %y:2 = torch.operator "torch.spikingbrain.linear_scan"(%x, %x, %h, %true, %false)
      : (!x, !x, !c, !torch.bool, !torch.bool) -> (!x, !c)
  %z:2 = torch.operator "torch.spikingbrain.selective_scan"(%y#0, %x, %a, %b, %b, %none, %true)
      : (!x, !x, !a, !n, !n, !torch.none, !torch.bool) -> (!x, !cn)
  return %z#0, %z#1 : !x, !cn
}

// What the dialect cannot say stays.
// CHECK-LABEL: func.func @refused(
func.func @refused(%x: !x, %y: !torch.vtensor<[1,?,?],f32>, %flag: !torch.bool) -> (!x, !torch.vtensor<[1,?,?],f32>) {
  %none = torch.constant.none
  %true = torch.constant.bool true
  // CHECK-COUNT-2: torch.operator "torch.spikingbrain.linear_scan"
  // expected-remark@+1 {{raise-recurrence: an argument that is not constant}}
  %p:2 = torch.operator "torch.spikingbrain.linear_scan"(%x, %x, %none, %flag, %true) : (!x, !x, !torch.none, !torch.bool, !torch.bool) -> (!x, !c)
  // expected-remark@+1 {{raise-recurrence: a dynamic number or size of heads or channels}}
  %r:2 = torch.operator "torch.spikingbrain.linear_scan"(%y, %y, %none, %true, %true) : (!torch.vtensor<[1,?,?],f32>, !torch.vtensor<[1,?,?],f32>, !torch.none, !torch.bool, !torch.bool) -> (!torch.vtensor<[1,?,?],f32>, !torch.vtensor<[1,?],f32>)
  return %p#0, %r#0 : !x, !torch.vtensor<[1,?,?],f32>
}
