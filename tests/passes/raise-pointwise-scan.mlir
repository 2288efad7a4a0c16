// RUN: spikingbrain opt -p raise-pointwise-scan --split-input-file %s | filecheck %s

// Several linalg ops become one region of scalars. What does not change over time is computed once, before; the weight is
// broadcast by its map.
// CHECK:       #[[STATE:.+]] = affine_map<(d0, d1, d2) -> (d1, d2)>
// CHECK:       #[[WEIGHT:.+]] = affine_map<(d0, d1, d2) -> (d2)>
// CHECK-LABEL: func.func @lif(
// CHECK:         %[[GATE:.+]] = linalg.generic
// CHECK:           math.exp
// CHECK:         "spikingbrain_control.pointwise_scan"(%{{.+}}, %{{.+}}, %[[GATE]]) ({
// CHECK-NEXT:    ^bb0(%[[S:.+]]: f32, %[[X:.+]]: f32, %[[W:.+]]: f32):
// CHECK-NEXT:      arith.mulf %[[S]], %[[W]] : f32
// CHECK-NEXT:      arith.addf
// CHECK-NEXT:      "spikingbrain_control.yield"
// CHECK:         backwards = [false, false], carried = 1 : i64, maps = [#[[STATE]], #{{.+}}, #[[WEIGHT]], #{{.+}}]
// CHECK-NOT:     time_loop
#id = affine_map<(d0, d1) -> (d0, d1)>
#row = affine_map<(d0, d1) -> (d1)>
#one = affine_map<(d0) -> (d0)>
func.func @lif(%s0: tensor<?x4xf32>, %xs: tensor<?x?x4xf32>, %w: tensor<4xf32>) -> (tensor<?x4xf32>, tensor<?x?x4xf32>) {
  %s, %ys = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%before: tensor<?x4xf32>, %x: tensor<?x4xf32>):
    %c0 = arith.constant 0 : index
    %n = tensor.dim %before, %c0 : tensor<?x4xf32>
    %out = tensor.empty(%n) : tensor<?x4xf32>
    %e = tensor.empty() : tensor<4xf32>
    %gate = linalg.generic {indexing_maps = [#one, #one], iterator_types = ["parallel"]} ins(%w : tensor<4xf32>) outs(%e : tensor<4xf32>) {
    ^bb1(%a: f32, %o: f32):
      %y = math.exp %a : f32
      linalg.yield %y : f32
    } -> tensor<4xf32>
    %kept = linalg.generic {indexing_maps = [#id, #row, #id], iterator_types = ["parallel", "parallel"]} ins(%before, %gate : tensor<?x4xf32>, tensor<4xf32>) outs(%out : tensor<?x4xf32>) {
    ^bb1(%a: f32, %b: f32, %o: f32):
      %y = arith.mulf %a, %b : f32
      linalg.yield %y : f32
    } -> tensor<?x4xf32>
    %after = linalg.generic {indexing_maps = [#id, #id, #id], iterator_types = ["parallel", "parallel"]} ins(%kept, %x : tensor<?x4xf32>, tensor<?x4xf32>) outs(%out : tensor<?x4xf32>) {
    ^bb1(%a: f32, %b: f32, %o: f32):
      %y = arith.addf %a, %b : f32
      linalg.yield %y : f32
    } -> tensor<?x4xf32>
    "spikingbrain_control.yield"(%after, %after) : (tensor<?x4xf32>, tensor<?x4xf32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<?x4xf32>, tensor<?x?x4xf32>) -> (tensor<?x4xf32>, tensor<?x?x4xf32>)
  return %s, %ys : tensor<?x4xf32>, tensor<?x?x4xf32>
}

// -----

// A sum over the space that only adds up over time, the gradient of a number that the body closes over, is taken afterwards.
// CHECK-LABEL: func.func @gradient(
// CHECK:         %[[ZEROS:.+]] = linalg.fill {{.+}} -> tensor<9xf32>
// CHECK:         %[[SCAN:.+]] = "spikingbrain_control.pointwise_scan"(%[[ZEROS]], %{{.+}}) ({
// CHECK-NEXT:    ^bb0(%[[SUM:.+]]: f32, %[[X:.+]]: f32):
// CHECK-NEXT:      %[[SQUARE:.+]] = arith.mulf %[[X]], %[[X]]
// CHECK-NEXT:      arith.addf %[[SUM]], %[[SQUARE]]
// CHECK:         linalg.generic {{.+}}iterator_types = ["reduction"]} ins(%[[SCAN]]
#line = affine_map<(d0) -> (d0)>
#total = affine_map<(d0) -> ()>
#none = affine_map<() -> ()>
func.func @gradient(%s0: tensor<f32>, %xs: tensor<?x9xf32>) -> tensor<f32> {
  %s = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%before: tensor<f32>, %x: tensor<9xf32>):
    %zero = arith.constant 0.0 : f32
    %e = tensor.empty() : tensor<9xf32>
    %square = linalg.generic {indexing_maps = [#line, #line], iterator_types = ["parallel"]} ins(%x : tensor<9xf32>) outs(%e : tensor<9xf32>) {
    ^bb1(%a: f32, %o: f32):
      %y = arith.mulf %a, %a : f32
      linalg.yield %y : f32
    } -> tensor<9xf32>
    %e0 = tensor.empty() : tensor<f32>
    %z = linalg.fill ins(%zero : f32) outs(%e0 : tensor<f32>) -> tensor<f32>
    %sum = linalg.generic {indexing_maps = [#line, #total], iterator_types = ["reduction"]} ins(%square : tensor<9xf32>) outs(%z : tensor<f32>) {
    ^bb1(%a: f32, %o: f32):
      %y = arith.addf %a, %o : f32
      linalg.yield %y : f32
    } -> tensor<f32>
    %after = linalg.generic {indexing_maps = [#none, #none, #none], iterator_types = []} ins(%before, %sum : tensor<f32>, tensor<f32>) outs(%e0 : tensor<f32>) {
    ^bb1(%a: f32, %b: f32, %o: f32):
      %y = arith.addf %a, %b : f32
      linalg.yield %y : f32
    } -> tensor<f32>
    "spikingbrain_control.yield"(%after) : (tensor<f32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<f32>, tensor<?x9xf32>) -> tensor<f32>
  return %s : tensor<f32>
}

// -----

// A transposed input and a transposed result are read and written where they lie; a reversed loop runs from the end.
// CHECK-DAG:   #[[IN:.+]] = affine_map<(d0, d1, d2) -> (d1, d0, d2)>
// CHECK-LABEL: func.func @batch_first(
// CHECK-SAME:      %[[S0:[a-z0-9]+]]: tensor<2x4xf32>, %[[X:[a-z0-9]+]]: tensor<2x3x4xf32>)
// CHECK:         %[[SCAN:.+]]:2 = "spikingbrain_control.pointwise_scan"(%[[S0]], %[[X]])
// CHECK:         backwards = [true, true], carried = 1 : i64, maps = [#{{.+}}, #[[IN]], #[[IN]]]
// CHECK:         return %[[SCAN]]#1
#id = affine_map<(d0, d1) -> (d0, d1)>
func.func @batch_first(%s0: tensor<2x4xf32>, %xs: tensor<2x3x4xf32>) -> tensor<2x3x4xf32> {
  %t = tensor.empty() : tensor<3x2x4xf32>
  %b = tensor.empty() : tensor<2x3x4xf32>
  %time_first = linalg.transpose ins(%xs : tensor<2x3x4xf32>) outs(%t : tensor<3x2x4xf32>) permutation = [1, 0, 2]
  %s, %ys = "spikingbrain_control.time_loop"(%s0, %time_first) ({
  ^bb0(%before: tensor<2x4xf32>, %x: tensor<2x4xf32>):
    %e = tensor.empty() : tensor<2x4xf32>
    %after = linalg.generic {indexing_maps = [#id, #id, #id], iterator_types = ["parallel", "parallel"]} ins(%before, %x : tensor<2x4xf32>, tensor<2x4xf32>) outs(%e : tensor<2x4xf32>) {
    ^bb1(%a: f32, %c: f32, %o: f32):
      %y = arith.addf %a, %c : f32
      linalg.yield %y : f32
    } -> tensor<2x4xf32>
    "spikingbrain_control.yield"(%after, %after) : (tensor<2x4xf32>, tensor<2x4xf32>) -> ()
  }) {carried = 1 : i64, reverse = true} : (tensor<2x4xf32>, tensor<3x2x4xf32>) -> (tensor<2x4xf32>, tensor<3x2x4xf32>)
  %back = linalg.transpose ins(%ys : tensor<3x2x4xf32>) outs(%b : tensor<2x3x4xf32>) permutation = [1, 0, 2]
  return %back : tensor<2x3x4xf32>
}

// -----

// A product within the body: left alone.
// CHECK-LABEL: func.func @cell(
// CHECK:         time_loop
// CHECK-NOT:     pointwise_scan
func.func @cell(%s0: tensor<2x4xf32>, %xs: tensor<?x2x4xf32>, %w: tensor<4x4xf32>) -> tensor<2x4xf32> {
  %s = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%before: tensor<2x4xf32>, %x: tensor<2x4xf32>):
    %after = linalg.matmul ins(%before, %w : tensor<2x4xf32>, tensor<4x4xf32>) outs(%x : tensor<2x4xf32>) -> tensor<2x4xf32>
    "spikingbrain_control.yield"(%after) : (tensor<2x4xf32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<2x4xf32>, tensor<?x2x4xf32>) -> tensor<2x4xf32>
  return %s : tensor<2x4xf32>
}

// -----

// Two sums taken alike, the parts of the gradient of a number that a step reads twice, are one; so is a sum over axes joined before.
// CHECK-LABEL: func.func @gradient_in_parts(
// CHECK:         %[[SCAN:.+]] = "spikingbrain_control.pointwise_scan"(%{{.+}}, %{{.+}}) ({
// CHECK-NEXT:    ^bb0(%[[SUM:.+]]: f32, %[[X:.+]]: f32):
// CHECK-NEXT:      %[[SQUARE:.+]] = arith.mulf %[[X]], %[[X]]
// CHECK-NEXT:      %[[MINUS:.+]] = arith.negf %[[X]]
// CHECK-NEXT:      %[[BOTH:.+]] = arith.addf %[[SQUARE]], %[[MINUS]]
// CHECK-NEXT:      arith.addf %[[SUM]], %[[BOTH]]
// CHECK:         tensor.collapse_shape %[[SCAN]]
// CHECK-COUNT-1: iterator_types = ["reduction"]
// CHECK-NOT:     iterator_types = ["reduction"]
#plane = affine_map<(d0, d1) -> (d0, d1)>
#line = affine_map<(d0) -> (d0)>
#total = affine_map<(d0) -> ()>
#none = affine_map<() -> ()>
func.func @gradient_in_parts(%s0: tensor<f32>, %xs: tensor<?x2x3xf32>) -> tensor<f32> {
  %s = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%before: tensor<f32>, %x: tensor<2x3xf32>):
    %zero = arith.constant 0.0 : f32
    %e = tensor.empty() : tensor<2x3xf32>
    %square = linalg.generic {indexing_maps = [#plane, #plane], iterator_types = ["parallel", "parallel"]} ins(%x : tensor<2x3xf32>) outs(%e : tensor<2x3xf32>) {
    ^bb1(%a: f32, %o: f32):
      %y = arith.mulf %a, %a : f32
      linalg.yield %y : f32
    } -> tensor<2x3xf32>
    %minus = linalg.generic {indexing_maps = [#plane, #plane], iterator_types = ["parallel", "parallel"]} ins(%x : tensor<2x3xf32>) outs(%e : tensor<2x3xf32>) {
    ^bb1(%a: f32, %o: f32):
      %y = arith.negf %a : f32
      linalg.yield %y : f32
    } -> tensor<2x3xf32>
    %e0 = tensor.empty() : tensor<f32>
    %z = linalg.fill ins(%zero : f32) outs(%e0 : tensor<f32>) -> tensor<f32>
    %flat = tensor.collapse_shape %square [[0, 1]] : tensor<2x3xf32> into tensor<6xf32>
    %first = linalg.generic {indexing_maps = [#line, #total], iterator_types = ["reduction"]} ins(%flat : tensor<6xf32>) outs(%z : tensor<f32>) {
    ^bb1(%a: f32, %o: f32):
      %y = arith.addf %a, %o : f32
      linalg.yield %y : f32
    } -> tensor<f32>
    %flat1 = tensor.collapse_shape %minus [[0, 1]] : tensor<2x3xf32> into tensor<6xf32>
    %second = linalg.generic {indexing_maps = [#line, #total], iterator_types = ["reduction"]} ins(%flat1 : tensor<6xf32>) outs(%z : tensor<f32>) {
    ^bb1(%a: f32, %o: f32):
      %y = arith.addf %a, %o : f32
      linalg.yield %y : f32
    } -> tensor<f32>
    %sum = linalg.generic {indexing_maps = [#none, #none, #none], iterator_types = []} ins(%first, %second : tensor<f32>, tensor<f32>) outs(%e0 : tensor<f32>) {
    ^bb1(%a: f32, %b: f32, %o: f32):
      %y = arith.addf %a, %b : f32
      linalg.yield %y : f32
    } -> tensor<f32>
    %after = linalg.generic {indexing_maps = [#none, #none, #none], iterator_types = []} ins(%before, %sum : tensor<f32>, tensor<f32>) outs(%e0 : tensor<f32>) {
    ^bb1(%a: f32, %b: f32, %o: f32):
      %y = arith.addf %a, %b : f32
      linalg.yield %y : f32
    } -> tensor<f32>
    "spikingbrain_control.yield"(%after) : (tensor<f32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<f32>, tensor<?x2x3xf32>) -> tensor<f32>
  return %s : tensor<f32>
}

// -----

// An assertion about one element, as torch-mlir writes one for a reciprocal, stays behind.
// CHECK-LABEL: func.func @reciprocal(
// CHECK:         "spikingbrain_control.pointwise_scan"
// CHECK-NOT:     cf.assert
// CHECK:         arith.divf
#line = affine_map<(d0) -> (d0)>
func.func @reciprocal(%s0: tensor<9xf32>, %xs: tensor<?x9xf32>) -> tensor<9xf32> {
  %s = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%before: tensor<9xf32>, %x: tensor<9xf32>):
    %e = tensor.empty() : tensor<9xf32>
    %after = linalg.generic {indexing_maps = [#line, #line, #line], iterator_types = ["parallel"]} ins(%before, %x : tensor<9xf32>, tensor<9xf32>) outs(%e : tensor<9xf32>) {
    ^bb1(%a: f32, %b: f32, %o: f32):
      %zero = arith.constant 0.0 : f32
      %nonzero = arith.cmpf one, %b, %zero : f32
      cf.assert %nonzero, "tensor with zero element"
      %y = arith.divf %a, %b : f32
      linalg.yield %y : f32
    } -> tensor<9xf32>
    "spikingbrain_control.yield"(%after) : (tensor<9xf32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<9xf32>, tensor<?x9xf32>) -> tensor<9xf32>
  return %s : tensor<9xf32>
}
