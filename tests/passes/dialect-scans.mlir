// RUN: spikingbrain opt --split-input-file --verify-diagnostics %s

// The final value of a carried tensor is of its type, and its map names the whole space.
func.func @transposed_state(%s0: tensor<4x5xf32>, %xs: tensor<3x4x5xf32>) -> tensor<4x5xf32> {
  // expected-error@+1 {{the maps of carried values name every axis of the space, in order}}
  %s = "spikingbrain_control.pointwise_scan"(%s0, %xs) ({
  ^bb0(%a: f32, %x: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }) {carried = 1 : i64, scanned = 1 : i64, backwards = [false],
      maps = [affine_map<(t, a, b) -> (b, a)>, affine_map<(t, a, b) -> (t, a, b)>]}
       : (tensor<4x5xf32>, tensor<3x4x5xf32>) -> tensor<4x5xf32>
  return %s : tensor<4x5xf32>
}

// -----

func.func @no_time(%s0: tensor<4xf32>, %w: tensor<4xf32>) -> tensor<4xf32> {
  // expected-error@+1 {{time is an axis of scanned and stacked tensors, and of no other}}
  %s = "spikingbrain_control.pointwise_scan"(%s0, %w) ({
  ^bb0(%a: f32, %x: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }) {carried = 1 : i64, scanned = 1 : i64, backwards = [false],
      maps = [affine_map<(t, n) -> (n)>, affine_map<(t, n) -> (n)>]} : (tensor<4xf32>, tensor<4xf32>) -> tensor<4xf32>
  return %s : tensor<4xf32>
}

// -----

func.func @sizes(%s0: tensor<4xf32>, %xs: tensor<?x5xf32>) -> tensor<4xf32> {
  // expected-error@+1 {{sizes differ along axis 0 of the space: 4 and 5}}
  %s = "spikingbrain_control.pointwise_scan"(%s0, %xs) ({
  ^bb0(%a: f32, %x: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }) {carried = 1 : i64, scanned = 1 : i64, backwards = [false],
      maps = [affine_map<(t, n) -> (n)>, affine_map<(t, n) -> (t, n)>]} : (tensor<4xf32>, tensor<?x5xf32>) -> tensor<4xf32>
  return %s : tensor<4xf32>
}

// -----

func.func @types(%s0: tensor<4xf32>, %xs: tensor<?x4xf64>) -> tensor<4xf32> {
  // expected-error@+1 {{body must take one element of every operand}}
  %s = "spikingbrain_control.pointwise_scan"(%s0, %xs) ({
  ^bb0(%a: f32, %x: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }) {carried = 1 : i64, scanned = 1 : i64, backwards = [false],
      maps = [affine_map<(t, n) -> (n)>, affine_map<(t, n) -> (t, n)>]} : (tensor<4xf32>, tensor<?x4xf64>) -> tensor<4xf32>
  return %s : tensor<4xf32>
}
