// RUN: spikingbrain opt -p lower-recurrence --target x86-64-v3 %s | filecheck %s
// RUN: spikingbrain opt -p lower-recurrence --target maca %s | filecheck %s --check-prefix=WAVES
// RUN: spikingbrain opt -p "lower-recurrence{steps=4}" --target vulkan %s | filecheck %s --check-prefix=PORTABLE

!q = tensor<1x?x4x8xf32>
!k = tensor<1x?x2x8xf32>
!v = tensor<1x?x2x16xf32>
!o = tensor<1x?x4x16xf32>
!s = tensor<1x2x8x16xf32>

// With vector kernels: one launch, its final state in the memory of the state.
// Without: products over chunks, and no loop beside them.
// CHECK-LABEL: func.func @gated(
// CHECK-SAME:      %[[Q:[a-z0-9]+]]: {{.+}}, %[[S:[a-z0-9]+]]: tensor<1x2x8x16xf32>)
// CHECK:         %[[R:.+]]:2 = "spikingbrain_control.launch"({{.+}}%[[S]]{{.+}}tied = [-1, 4]
// CHECK:         return %[[R]]#0, %[[R]]#1
// With waves: the first launch makes the states that enter chunks, the second answers the queries of all of them.
// WAVES-LABEL: func.func @gated(
// WAVES-SAME:      %[[S:[a-z0-9]+]]: tensor<1x2x8x16xf32>)
// WAVES:         %[[E:.+]]:2 = "spikingbrain_control.launch"({{.+}}%[[S]]{{.+}}tied = [-1, 4]
// WAVES:         %[[O:.+]] = "spikingbrain_control.launch"({{.+}}%[[E]]#0{{.+}}tied = [-1]
// WAVES:         return %[[O]], %[[E]]#1
// PORTABLE-LABEL: func.func @gated(
// PORTABLE-NOT:     = scf.for {{.+}} -> (tensor
// PORTABLE:         linalg.generic {{.+}}"reduction"
// PORTABLE-NOT:     linear_recurrence
// PORTABLE:         return
func.func @gated(%q: !q, %k: !k, %v: !v, %g: !k, %s: !s) -> (!o, !s) {
  %o, %t = "spikingbrain.linear_recurrence"(%q, %k, %v, %g, %s) {decay_axis = "key", log_decay = true, exclusive = false,
      reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 0, 0, 1>} : (!q, !k, !v, !k, !s) -> (!o, !s)
  return %o, %t : !o, !s
}

!q1 = tensor<1x1x4x8xf32>
!k1 = tensor<1x1x2x8xf32>
!v1 = tensor<1x1x2x16xf32>
!o1 = tensor<1x1x4x16xf32>

// A rank-one part of one step needs no loop, of many it needs one over chunks, with the state in it.
// PORTABLE-LABEL: func.func @delta_step(
// PORTABLE-NOT:     scf.for
// PORTABLE:         return
func.func @delta_step(%q: !q1, %k: !k1, %v: !v1, %e: !k1, %s: !s) -> (!o1, !s) {
  %o, %t = "spikingbrain.linear_recurrence"(%q, %k, %v, %e, %k, %s) {decay_axis = "none", log_decay = false, exclusive = false,
      reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 1, 1, 0, 1>} : (!q1, !k1, !v1, !k1, !k1, !s) -> (!o1, !s)
  return %o, %t : !o1, !s
}

// PORTABLE-LABEL: func.func @delta(
// PORTABLE:         = scf.for {{.+}} -> (tensor<1x2x8x16xf32>, tensor<?x?x1x2x8x16xf32>)
// PORTABLE:           = scf.for {{.+}} -> (tensor<1x2x8x16xf32>, tensor<?x1x2x8x16xf32>)
// PORTABLE:         return
func.func @delta(%q: !q, %k: !k, %v: !v, %e: !k, %s: !s) -> (!o, !s) {
  %o, %t = "spikingbrain.linear_recurrence"(%q, %k, %v, %e, %k, %s) {decay_axis = "none", log_decay = false, exclusive = false,
      reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 1, 1, 0, 1>} : (!q, !k, !v, !k, !k, !s) -> (!o, !s)
  return %o, %t : !o, !s
}

// The kernels are of f32.
// CHECK-LABEL: func.func @double(
// CHECK-NOT:     launch
// CHECK:         linalg.generic
// CHECK:         return
func.func @double(%q: tensor<1x3x2x4xf64>, %v: tensor<1x3x2x6xf64>) -> (tensor<1x3x2x6xf64>, tensor<1x2x4x6xf64>) {
  %o, %t = "spikingbrain.linear_recurrence"(%q, %q, %v) {decay_axis = "none", log_decay = false, exclusive = false,
      reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>}
      : (tensor<1x3x2x4xf64>, tensor<1x3x2x4xf64>, tensor<1x3x2x6xf64>) -> (tensor<1x3x2x6xf64>, tensor<1x2x4x6xf64>)
  return %o, %t : tensor<1x3x2x6xf64>, tensor<1x2x4x6xf64>
}

#joint = affine_map<(b, t, h, c) -> (b, t, h * 8 + c)>
#id = affine_map<(b, t, h, c) -> (b, t, h, c)>

// What a recurrence computes around itself is part of its kernel, which reads each tensor once; without one, it becomes linalg.
// CHECK-LABEL: func.func @fused(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: {{[^%]+}}, %[[V:[a-z0-9]+]]: {{[^%]+}})
// CHECK-NOT:     linalg
// CHECK:         "spikingbrain_control.launch"(%{{.+}}, %{{.+}}, %{{.+}}, %[[X]], %[[V]], %{{.+}}) {{.+}}tied = [-1, -1]
// CHECK-NOT:     linalg
// CHECK:         return
// PORTABLE-LABEL: func.func @fused(
// PORTABLE:         math.exp
// PORTABLE-NOT:     fused_recurrence
// PORTABLE:         return
func.func @fused(%x: tensor<1x?x32xf32>, %v: tensor<1x?x4x16xf32>) -> (tensor<1x?x4x16xf32>, tensor<1x4x8x16xf32>) {
  %o, %t = "spikingbrain_control.fused_recurrence"(%x, %x, %v) ({
  ^bb0(%a: f32):
    %b = math.exp %a : f32
    "spikingbrain_control.yield"(%b) : (f32) -> ()
  }, {
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }, {
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }) {decay_axis = "none", log_decay = false, exclusive = false, reverse = false, parts = ["q", "k", "v"],
      maps = [#joint, #joint, #id]}
      : (tensor<1x?x32xf32>, tensor<1x?x32xf32>, tensor<1x?x4x16xf32>) -> (tensor<1x?x4x16xf32>, tensor<1x4x8x16xf32>)
  return %o, %t : tensor<1x?x4x16xf32>, tensor<1x4x8x16xf32>
}
