// RUN: spikingbrain opt -p fuse-into-recurrence --target x86-64-v3 %s | filecheck %s
// RUN: spikingbrain opt -p fuse-into-recurrence --target vulkan %s | filecheck %s --check-prefix=WITHOUT

// There is no kernel to compute anything in.
// WITHOUT-NOT: fused_recurrence

!joint = tensor<1x?x48xf32>
!flat = tensor<1x?x16xf32>
!x = tensor<1x?x2x8xf32>
!h = tensor<1x?x2xf32>
!n = tensor<1x?x2x1xf32>
!s = tensor<1x2x8x8xf32>

#id = affine_map<(d0, d1, d2, d3) -> (d0, d1, d2, d3)>
#row = affine_map<(d0, d1, d2, d3) -> (d0, d1, d2, 0)>
#channel = affine_map<(d0, d1, d2, d3) -> (d3)>
#head = affine_map<(d0, d1, d2) -> (d0, d1, d2)>
#heads = affine_map<(d0, d1, d2, d3) -> (d0, d1, 0, d3)>

// CHECK-DAG: #[[LAST:.+]] = affine_map<(d0, d1, d2, d3) -> (d0, d1, d2 * 8 + d3 + 32)>
// CHECK-DAG: #[[FIRST:.+]] = affine_map<(d0, d1, d2, d3) -> (d0, d1, d2 * 8 + d3)>
// CHECK-DAG: #[[ID:.+]] = affine_map<(d0, d1, d2, d3) -> (d0, d1, d2, d3)>
// CHECK-DAG: #[[CHANNEL:.+]] = affine_map<(d0, d1, d2, d3) -> (d3)>

// Queries are computed of a slice of a joint projection, keys read from one, the bias of a gate is one for all tokens.
// CHECK-LABEL: func.func @in_front(
// CHECK-SAME:      %[[P:[a-z0-9]+]]: tensor<1x?x48xf32>, %[[V:[a-z0-9]+]]: {{[^,]+}}, %[[G:[a-z0-9]+]]: {{[^,]+}}, %[[BIAS:[a-z0-9]+]]: tensor<8xf32>
// CHECK:         "spikingbrain_control.fused_recurrence"(%[[P]], %[[P]], %[[V]], %[[G]], %[[BIAS]]) ({
// CHECK-NEXT:    ^bb0(%[[A:.+]]: f32):
// CHECK-NEXT:      %[[Q:.+]] = math.exp %[[A]] : f32
// CHECK-NEXT:      "spikingbrain_control.yield"(%[[Q]])
// CHECK-NEXT:    }, {
// CHECK-NEXT:    ^bb0(%[[K:.+]]: f32):
// CHECK-NEXT:      "spikingbrain_control.yield"(%[[K]])
// CHECK:         ^bb0(%[[A:.+]]: f32, %[[B:.+]]: f32):
// CHECK-NEXT:      %[[SUM:.+]] = arith.addf %[[A]], %[[B]] : f32
// CHECK-NEXT:      %[[NEG:.+]] = arith.negf %[[SUM]] : f32
// CHECK-NEXT:      "spikingbrain_control.yield"(%[[NEG]])
// CHECK:         maps = [#[[FIRST]], #[[LAST]], #[[ID]], #[[ID]], #[[CHANNEL]]], parts = ["q", "k", "v", "decay"]
func.func @in_front(%p: !joint, %v: !x, %g: !x, %bias: tensor<8xf32>, %t: index) -> (!x, !s) {
  %ps = tensor.extract_slice %p[0, 0, 0] [1, %t, 16] [1, 1, 1] : !joint to !flat
  %pk = tensor.extract_slice %p[0, 0, 32] [1, %t, 16] [1, 1, 1] : !joint to !flat
  %a = tensor.expand_shape %ps [[0], [1], [2, 3]] output_shape [1, %t, 2, 8] : !flat into !x
  %k = tensor.expand_shape %pk [[0], [1], [2, 3]] output_shape [1, %t, 2, 8] : !flat into !x
  %e = tensor.empty(%t) : !x
  %q = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%a : !x) outs(%e : !x) {
  ^bb0(%in: f32, %out: f32):
    %y = math.exp %in : f32
    linalg.yield %y : f32
  } -> !x
  %b = linalg.generic {indexing_maps = [#id, #channel, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%g, %bias : !x, tensor<8xf32>) outs(%e : !x) {
  ^bb0(%in: f32, %of: f32, %out: f32):
    %y = arith.addf %in, %of : f32
    linalg.yield %y : f32
  } -> !x
  %d = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%b : !x) outs(%e : !x) {
  ^bb0(%in: f32, %out: f32):
    %y = arith.negf %in : f32
    linalg.yield %y : f32
  } -> !x
  %o, %last = "spikingbrain.linear_recurrence"(%q, %k, %v, %d) {decay_axis = "key", log_decay = true, exclusive = false,
      reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 0, 0, 0>} : (!x, !x, !x, !x) -> (!x, !s)
  return %o, %last : !x, !s
}

// A sum over the channels of a head, and the gate that follows, in another type.
// CHECK-LABEL: func.func @behind(
// CHECK:         %[[R:.+]]:2 = "spikingbrain_control.fused_recurrence"(%[[X:.+]], %[[X]], %[[X]], %[[Z:.+]]) (
// CHECK:           %[[SQUARE:.+]] = arith.mulf
// CHECK-NEXT:      "spikingbrain_control.yield"(%[[SQUARE]])
// CHECK-NEXT:    }, {
// CHECK-NEXT:    ^bb0(%[[O:.+]]: f32, %[[SUM:.+]]: f32, %[[GATE:.+]]: f32):
// CHECK-NEXT:      %[[RATE:.+]] = math.rsqrt %[[SUM]] : f32
// CHECK-NEXT:      %[[NORM:.+]] = arith.mulf %[[O]], %[[RATE]] : f32
// CHECK-NEXT:      %[[GATED:.+]] = arith.mulf %[[NORM]], %[[GATE]] : f32
// CHECK-NEXT:      %[[Y:.+]] = arith.truncf %[[GATED]] : f32 to bf16
// CHECK-NEXT:      "spikingbrain_control.yield"(%[[Y]])
// CHECK:         parts = ["q", "k", "v", "sum", "o"]
// CHECK-SAME:      -> (tensor<1x?x2x8xbf16>, tensor<1x2x8x8xf32>)
// CHECK-NEXT:    %[[FLAT:.+]] = tensor.collapse_shape %[[R]]#0
// CHECK-NEXT:    return %[[FLAT]], %[[R]]#1
func.func @behind(%x: !x, %z: !flat, %t: index) -> (tensor<1x?x16xbf16>, !s) {
  %o, %last = "spikingbrain.linear_recurrence"(%x, %x, %x) {decay_axis = "none", log_decay = false, exclusive = false,
      reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>} : (!x, !x, !x) -> (!x, !s)
  %e = tensor.empty(%t) : !x
  %n = tensor.empty(%t) : !n
  %f = tensor.empty(%t) : tensor<1x?x16xbf16>
  %zero = arith.constant 0.0 : f32
  %start = linalg.fill ins(%zero : f32) outs(%n : !n) -> !n
  %sum = linalg.generic {indexing_maps = [#id, #row], iterator_types = ["parallel", "parallel", "parallel", "reduction"]}
      ins(%o : !x) outs(%start : !n) {
  ^bb0(%in: f32, %out: f32):
    %square = arith.mulf %in, %in : f32
    %y = arith.addf %square, %out : f32
    linalg.yield %y : f32
  } -> !n
  %rate = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%sum : !n) outs(%n : !n) {
  ^bb0(%in: f32, %out: f32):
    %y = math.rsqrt %in : f32
    linalg.yield %y : f32
  } -> !n
  %normed = linalg.generic {indexing_maps = [#id, #row, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%o, %rate : !x, !n) outs(%e : !x) {
  ^bb0(%in: f32, %r: f32, %out: f32):
    %y = arith.mulf %in, %r : f32
    linalg.yield %y : f32
  } -> !x
  %flat = tensor.collapse_shape %normed [[0], [1], [2, 3]] : !x into !flat
  %y = linalg.generic {indexing_maps = [#head, #head, #head], iterator_types = ["parallel", "parallel", "parallel"]}
      ins(%flat, %z : !flat, !flat) outs(%f : tensor<1x?x16xbf16>) {
  ^bb0(%in: f32, %g: f32, %out: bf16):
    %y = arith.mulf %in, %g : f32
    %narrow = arith.truncf %y : f32 to bf16
    linalg.yield %narrow : bf16
  } -> tensor<1x?x16xbf16>
  return %y, %last : tensor<1x?x16xbf16>, !s
}

// What others read too is computed once, and stays in memory; so do the outputs.
// CHECK-LABEL: func.func @other_readers(
// CHECK:         %[[Q:.+]] = linalg.generic
// CHECK:         "spikingbrain.linear_recurrence"(%[[Q]]
// CHECK:         linalg.generic
// CHECK:         return
func.func @other_readers(%x: !x, %t: index) -> (!x, !x, !x) {
  %e = tensor.empty(%t) : !x
  %q = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%x : !x) outs(%e : !x) {
  ^bb0(%in: f32, %out: f32):
    %y = math.exp %in : f32
    linalg.yield %y : f32
  } -> !x
  %o, %last = "spikingbrain.linear_recurrence"(%q, %x, %x) {decay_axis = "none", log_decay = false, exclusive = false,
      reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>} : (!x, !x, !x) -> (!x, !s)
  %y = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%o : !x) outs(%e : !x) {
  ^bb0(%in: f32, %out: f32):
    %y = math.exp %in : f32
    linalg.yield %y : f32
  } -> !x
  return %q, %o, %y : !x, !x, !x
}

// A sum over heads is none of a row, and decays of heads are too small to be worth it.
// CHECK-LABEL: func.func @look_alikes(
// CHECK:         linalg.generic
// CHECK:         "spikingbrain.linear_recurrence"
// CHECK:         linalg.generic {{.+}}"reduction"
// CHECK:         linalg.generic
// CHECK:         return
func.func @look_alikes(%x: !x, %d: !h, %t: index) -> !x {
  %e = tensor.empty(%t) : !x
  %small = tensor.empty(%t) : !h
  %r = tensor.empty(%t) : tensor<1x?x1x8xf32>
  %zero = arith.constant 0.0 : f32
  %g = linalg.generic {indexing_maps = [#head, #head], iterator_types = ["parallel", "parallel", "parallel"]}
      ins(%d : !h) outs(%small : !h) {
  ^bb0(%in: f32, %out: f32):
    %y = arith.negf %in : f32
    linalg.yield %y : f32
  } -> !h
  %o, %last = "spikingbrain.linear_recurrence"(%x, %x, %x, %g) {decay_axis = "head", log_decay = true, exclusive = false,
      reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 0, 0, 0>} : (!x, !x, !x, !h) -> (!x, !s)
  %start = linalg.fill ins(%zero : f32) outs(%r : tensor<1x?x1x8xf32>) -> tensor<1x?x1x8xf32>
  %sum = linalg.generic {indexing_maps = [#id, #heads], iterator_types = ["parallel", "parallel", "reduction", "parallel"]}
      ins(%o : !x) outs(%start : tensor<1x?x1x8xf32>) {
  ^bb0(%in: f32, %out: f32):
    %y = arith.addf %in, %out : f32
    linalg.yield %y : f32
  } -> tensor<1x?x1x8xf32>
  %y = linalg.generic {indexing_maps = [#id, #heads, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%o, %sum : !x, tensor<1x?x1x8xf32>) outs(%e : !x) {
  ^bb0(%in: f32, %s: f32, %out: f32):
    %y = arith.mulf %in, %s : f32
    linalg.yield %y : f32
  } -> !x
  return %y : !x
}

!wide = tensor<1x?x28x128xf32>
!one = tensor<1x?x1x128xf32>
!w = tensor<1x1x128x128xf32>

// Several workgroups share a state: each would compute all keys, and none has whole rows of outputs. Values are theirs alone.
// CHECK-LABEL: func.func @columns_are_split(
// CHECK:         %[[K:.+]] = linalg.generic
// CHECK:         "spikingbrain_control.fused_recurrence"(%{{.+}}, %[[K]], %{{.+}}) (
// CHECK:           math.exp
// CHECK:         parts = ["q", "k", "v"]
func.func @columns_are_split(%q: !wide, %x: !one, %z: !one, %t: index) -> !wide {
  %e = tensor.empty(%t) : !one
  %k = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%x : !one) outs(%e : !one) {
  ^bb0(%in: f32, %out: f32):
    %y = math.exp %in : f32
    linalg.yield %y : f32
  } -> !one
  %v = linalg.generic {indexing_maps = [#id, #id], iterator_types = ["parallel", "parallel", "parallel", "parallel"]}
      ins(%z : !one) outs(%e : !one) {
  ^bb0(%in: f32, %out: f32):
    %y = math.exp %in : f32
    linalg.yield %y : f32
  } -> !one
  %o, %last = "spikingbrain.linear_recurrence"(%q, %k, %v) {decay_axis = "none", log_decay = false, exclusive = false,
      reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>} : (!wide, !one, !one) -> (!wide, !w)
  return %o : !wide
}
