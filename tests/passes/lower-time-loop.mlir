// RUN: spikingbrain opt -p lower-time-loop %s | filecheck %s

// The carried value and the stack go round; a slice of the scanned tensor is taken at each step.
// CHECK-LABEL: func.func @forward(
// CHECK-SAME:      %[[S0:[a-z0-9]+]]: tensor<4xf32>, %[[XS:[a-z0-9]+]]: tensor<?x4xf32>)
func.func @forward(%s0: tensor<4xf32>, %xs: tensor<?x4xf32>) -> (tensor<4xf32>, tensor<?x4xf32>) {
  // CHECK:         %[[T:.+]] = tensor.dim %[[XS]]
  // CHECK:         %[[EMPTY:.+]] = tensor.empty(%[[T]]) : tensor<?x4xf32>
  // CHECK:         %[[LOOP:.+]]:2 = scf.for %[[I:[a-z0-9]+]] = %{{.+}} to %[[T]] step %{{.+}} iter_args(%[[S:.+]] = %[[S0]], %[[YS:.+]] = %[[EMPTY]])
  // CHECK-NEXT:      %[[X:.+]] = tensor.extract_slice %[[XS]][%[[I]], 0] [1, 4] [1, 1] : tensor<?x4xf32> to tensor<4xf32>
  // CHECK-NEXT:      %[[S1:.+]] = arith.addf %[[S]], %[[X]]
  // CHECK-NEXT:      %[[Y:.+]] = arith.mulf %[[S1]], %[[X]]
  // CHECK-NEXT:      %[[NEW:.+]] = tensor.insert_slice %[[Y]] into %[[YS]][%[[I]], 0] [1, 4] [1, 1]
  // CHECK-NEXT:      scf.yield %[[S1]], %[[NEW]]
  // CHECK:         return %[[LOOP]]#0, %[[LOOP]]#1
  %s, %ys = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%before: tensor<4xf32>, %x: tensor<4xf32>):
    %after = arith.addf %before, %x : tensor<4xf32>
    %y = arith.mulf %after, %x : tensor<4xf32>
    "spikingbrain_control.yield"(%after, %y) : (tensor<4xf32>, tensor<4xf32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<4xf32>, tensor<?x4xf32>) -> (tensor<4xf32>, tensor<?x4xf32>)
  return %s, %ys : tensor<4xf32>, tensor<?x4xf32>
}

// Reversed, step i works on slice T - 1 - i, of inputs and results alike.
// CHECK-LABEL: func.func @backward(
func.func @backward(%s0: tensor<4xf32>, %xs: tensor<8x4xf32>) -> tensor<8x4xf32> {
  // CHECK:         scf.for %[[I:[a-z0-9]+]] =
  // CHECK-NEXT:      %[[LAST:.+]] = arith.subi %c8, %c1 : index
  // CHECK-NEXT:      %[[T:.+]] = arith.subi %[[LAST]], %[[I]]
  // CHECK-NEXT:      tensor.extract_slice %{{.+}}[%[[T]], 0]
  // CHECK:           tensor.insert_slice %{{.+}} into %{{.+}}[%[[T]], 0]
  %s, %ys = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%before: tensor<4xf32>, %x: tensor<4xf32>):
    %after = arith.addf %before, %x : tensor<4xf32>
    "spikingbrain_control.yield"(%after, %after) : (tensor<4xf32>, tensor<4xf32>) -> ()
  }) {carried = 1 : i64, reverse = true} : (tensor<4xf32>, tensor<8x4xf32>) -> (tensor<4xf32>, tensor<8x4xf32>)
  return %ys : tensor<8x4xf32>
}

// A dynamic batch: the stack has the batch of the scanned tensor.
// CHECK-LABEL: func.func @dynamic_batch(
// CHECK-SAME:      %[[XS:[a-z0-9]+]]: tensor<?x?x4xf32>)
func.func @dynamic_batch(%s0: tensor<?x4xf32>, %xs: tensor<?x?x4xf32>) -> tensor<?x?x4xf32> {
  // CHECK:         %[[T:.+]] = tensor.dim %[[XS]], %c0
  // CHECK:         %[[B:.+]] = tensor.dim %[[XS]], %c1
  // CHECK:         tensor.empty(%[[T]], %[[B]])
  %s, %ys = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%before: tensor<?x4xf32>, %x: tensor<?x4xf32>):
    %after = arith.addf %before, %x : tensor<?x4xf32>
    "spikingbrain_control.yield"(%after, %after) : (tensor<?x4xf32>, tensor<?x4xf32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<?x4xf32>, tensor<?x?x4xf32>) -> (tensor<?x4xf32>, tensor<?x?x4xf32>)
  return %ys : tensor<?x?x4xf32>
}

// A loop within a loop; both become scf.for.
// CHECK-LABEL: func.func @nested(
func.func @nested(%s0: tensor<f32>, %xs: tensor<3x2xf32>) -> tensor<f32> {
  // CHECK:         scf.for
  // CHECK:           scf.for
  // CHECK:             arith.addf
  // CHECK:             scf.yield
  // CHECK:           scf.yield
  %s = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%outer: tensor<f32>, %row: tensor<2xf32>):
    %inner = "spikingbrain_control.time_loop"(%outer, %row) ({
    ^bb0(%before: tensor<f32>, %x: tensor<f32>):
      %after = arith.addf %before, %x : tensor<f32>
      "spikingbrain_control.yield"(%after) : (tensor<f32>) -> ()
    }) {carried = 1 : i64, reverse = false} : (tensor<f32>, tensor<2xf32>) -> tensor<f32>
    "spikingbrain_control.yield"(%inner) : (tensor<f32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<f32>, tensor<3x2xf32>) -> tensor<f32>
  return %s : tensor<f32>
}

// Other loops are left alone.
// CHECK-LABEL: func.func @plain_loop(
// CHECK-NOT:     tensor.extract_slice
// CHECK:         return
func.func @plain_loop(%s0: tensor<f32>) -> tensor<f32> {
  %zero = arith.constant 0 : index
  %one = arith.constant 1 : index
  %s = scf.for %i = %zero to %one step %one iter_args(%before = %s0) -> tensor<f32> {
    %after = arith.addf %before, %before : tensor<f32>
    scf.yield %after : tensor<f32>
  }
  return %s : tensor<f32>
}
