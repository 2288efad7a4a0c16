// RUN: spikingbrain opt -p lower-time-loop %s | filecheck %s

// The carried value and the stack go round; a slice of the scanned tensor is taken at each step. As IREE copies what goes round,
// steps are stacked in chunks and chunks in the whole; the last chunk is a part.
// CHECK-LABEL: func.func @forward(
// CHECK-SAME:      %[[S0:[a-z0-9]+]]: tensor<4xf32>, %[[XS:[a-z0-9]+]]: tensor<?x4xf32>)
func.func @forward(%s0: tensor<4xf32>, %xs: tensor<?x4xf32>) -> (tensor<4xf32>, tensor<?x4xf32>) {
  // CHECK:         %[[T:.+]] = tensor.dim %[[XS]]
  // CHECK:         %[[EMPTY:.+]] = tensor.empty(%[[T]]) : tensor<?x4xf32>
  // CHECK:         %[[LOOP:.+]]:2 = scf.for %[[FIRST:[a-z0-9]+]] = %{{.+}} to %[[T]] step %c32{{.*}} iter_args(%[[S:.+]] = %[[S0]], %[[YS:.+]] = %[[EMPTY]])
  // CHECK:           %[[LEFT:.+]] = arith.subi %[[T]], %[[FIRST]]
  // CHECK-NEXT:      %[[COUNT:.+]] = arith.minsi %{{.+}}, %[[LEFT]]
  // CHECK-NEXT:      %[[CHUNK:.+]] = tensor.empty() : tensor<32x4xf32>
  // CHECK-NEXT:      %[[INNER:.+]]:2 = scf.for %[[I:[a-z0-9]+]] = %{{.+}} to %[[COUNT]] step %{{.+}} iter_args(%[[SI:.+]] = %[[S]], %[[ROWS:.+]] = %[[CHUNK]])
  // CHECK:             %[[X:.+]] = tensor.extract_slice %[[XS]][%{{.+}}, 0] [1, 4] [1, 1] : tensor<?x4xf32> to tensor<4xf32>
  // CHECK-NEXT:        %[[S1:.+]] = arith.addf %[[SI]], %[[X]]
  // CHECK-NEXT:        %[[Y:.+]] = arith.mulf %[[S1]], %[[X]]
  // CHECK-NEXT:        %[[NEW:.+]] = tensor.insert_slice %[[Y]] into %[[ROWS]][%{{.+}}, 0] [1, 4] [1, 1]
  // CHECK-NEXT:        scf.yield %[[S1]], %[[NEW]]
  // CHECK:           %[[FULL:.+]] = tensor.extract_slice %[[INNER]]#1[0, 0] [%[[COUNT]], 4] [1, 1]
  // CHECK-NEXT:      %[[WHOLE:.+]] = tensor.insert_slice %[[FULL]] into %[[YS]][%[[FIRST]], 0] [%[[COUNT]], 4] [1, 1]
  // CHECK-NEXT:      scf.yield %[[INNER]]#0, %[[WHOLE]]
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
  // CHECK:         scf.for %[[I:[a-z0-9]+]] = %c0 to %c8
  // CHECK:           %[[LAST:.+]] = arith.subi %c8, %c1 : index
  // CHECK-NEXT:      %[[T:.+]] = arith.subi %[[LAST]], %{{.+}}
  // CHECK:           tensor.extract_slice %{{.+}}[%[[T]], 0]
  // CHECK:           tensor.insert_slice %{{.+}} into %{{.+}}[%{{.+}}, 0]
  %s, %ys = "spikingbrain_control.time_loop"(%s0, %xs) ({
  ^bb0(%before: tensor<4xf32>, %x: tensor<4xf32>):
    %after = arith.addf %before, %x : tensor<4xf32>
    "spikingbrain_control.yield"(%after, %after) : (tensor<4xf32>, tensor<4xf32>) -> ()
  }) {carried = 1 : i64, reverse = true} : (tensor<4xf32>, tensor<8x4xf32>) -> (tensor<4xf32>, tensor<8x4xf32>)
  return %ys : tensor<8x4xf32>
}

// A dynamic batch: the stack has the batch of what is stacked, and no chunks, as these would have no static shape.
// CHECK-LABEL: func.func @dynamic_batch(
// CHECK-SAME:      %[[S0:[a-z0-9]+]]: tensor<?x4xf32>, %[[XS:[a-z0-9]+]]: tensor<?x?x4xf32>)
func.func @dynamic_batch(%s0: tensor<?x4xf32>, %xs: tensor<?x?x4xf32>) -> tensor<?x?x4xf32> {
  // CHECK:         %[[T:.+]] = tensor.dim %[[XS]], %c0
  // CHECK:         %[[B:.+]] = tensor.dim %[[S0]], %c0
  // CHECK:         tensor.empty(%[[T]], %[[B]])
  // CHECK:         scf.for %{{.+}} = %{{.+}} to %[[T]] step %c1
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
