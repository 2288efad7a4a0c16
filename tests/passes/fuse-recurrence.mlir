// RUN: spikingbrain opt -p raise-recurrence,fuse-recurrence %s | filecheck %s

!q = !torch.vtensor<[1,?,4,8],f32>
!x = !torch.vtensor<[1,?,2,8],f32>
!y = !torch.vtensor<[1,?,2,1,8],f32>
!z = !torch.vtensor<[1,?,2,2,8],f32>
!s = !torch.vtensor<[1,4,8,8],f32>

// k.repeat_interleave(2, 2) and the same of v: heads share states, and the final one is repeated.
// CHECK-LABEL: func.func @repeated(
// CHECK-SAME:      %[[Q:[a-z0-9]+]]: {{[^%]+}}, %[[K:[a-z0-9]+]]: {{[^%]+}}, %[[V:[a-z0-9]+]]: {{[^%]+}})
func.func @repeated(%q: !q, %k: !x, %v: !x) -> (!q, !s) {
  %none = torch.constant.none
  %axis = torch.constant.str "none"
  %false = torch.constant.bool false
  %one = torch.constant.int 1
  %two = torch.constant.int 2
  %three = torch.constant.int 3
  %same = torch.constant.int -1
  %sizes = torch.prim.ListConstruct %same, %same, %same, %two, %same
      : (!torch.int, !torch.int, !torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %k1 = torch.aten.unsqueeze %k, %three : !x, !torch.int -> !y
  %k2 = torch.aten.expand %k1, %sizes, %false : !y, !torch.list<int>, !torch.bool -> !z
  %k3 = torch.aten.flatten.using_ints %k2, %two, %three : !z, !torch.int, !torch.int -> !q
  %v1 = torch.aten.unsqueeze %v, %three : !x, !torch.int -> !y
  %v2 = torch.aten.expand %v1, %sizes, %false : !y, !torch.list<int>, !torch.bool -> !z
  %v3 = torch.aten.flatten.using_ints %v2, %two, %three : !z, !torch.int, !torch.int -> !q
  // CHECK-DAG:     %[[PQ:.+]] = torch_c.to_builtin_tensor %[[Q]]
  // CHECK-DAG:     %[[PK:.+]] = torch_c.to_builtin_tensor %[[K]]
  // CHECK-DAG:     %[[PV:.+]] = torch_c.to_builtin_tensor %[[V]]
  // CHECK:         %[[R:.+]]:2 = "spikingbrain.linear_recurrence"(%[[PQ]], %[[PK]], %[[PV]])
  // CHECK-SAME:      -> (tensor<1x?x4x8xf32>, tensor<1x2x8x8xf32>)
  // CHECK:         linalg.generic {{.+}} ins(%[[R]]#1
  // CHECK:         tensor.collapse_shape {{.+}} into tensor<1x4x8x8xf32>
  %r:2 = torch.operator "torch.spikingbrain.linear_recurrence"(%q, %k3, %v3, %none, %none, %none, %none, %none, %axis, %false, %false, %false)
      : (!q, !q, !q, !torch.none, !torch.none, !torch.none, !torch.none, !torch.none, !torch.str, !torch.bool, !torch.bool, !torch.bool) -> (!q, !s)
  return %r#0, %r#1 : !q, !s
}

// Only one of the two is repeated, or the state is given: the states differ.
// CHECK-LABEL: func.func @different(
func.func @different(%q: !q, %k: !x, %v: !q, %s: !s) -> (!q, !q) {
  %none = torch.constant.none
  %axis = torch.constant.str "none"
  %false = torch.constant.bool false
  %two = torch.constant.int 2
  %three = torch.constant.int 3
  %same = torch.constant.int -1
  %sizes = torch.prim.ListConstruct %same, %same, %same, %two, %same
      : (!torch.int, !torch.int, !torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %k1 = torch.aten.unsqueeze %k, %three : !x, !torch.int -> !y
  %k2 = torch.aten.expand %k1, %sizes, %false : !y, !torch.list<int>, !torch.bool -> !z
  %k3 = torch.aten.flatten.using_ints %k2, %two, %three : !z, !torch.int, !torch.int -> !q
  // CHECK-COUNT-2: "spikingbrain.linear_recurrence"({{.+}} -> (tensor<1x?x4x8xf32>, tensor<1x4x8x8xf32>)
  %a:2 = torch.operator "torch.spikingbrain.linear_recurrence"(%q, %k3, %v, %none, %none, %none, %none, %none, %axis, %false, %false, %false)
      : (!q, !q, !q, !torch.none, !torch.none, !torch.none, !torch.none, !torch.none, !torch.str, !torch.bool, !torch.bool, !torch.bool) -> (!q, !s)
  %b:2 = torch.operator "torch.spikingbrain.linear_recurrence"(%q, %k3, %k3, %none, %none, %none, %none, %s, %axis, %false, %false, %false)
      : (!q, !q, !q, !torch.none, !torch.none, !torch.none, !torch.none, !s, !torch.str, !torch.bool, !torch.bool, !torch.bool) -> (!q, !s)
  return %a#0, %b#0 : !q, !q
}
