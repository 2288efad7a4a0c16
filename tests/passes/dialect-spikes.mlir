// RUN: spikingbrain opt --split-input-file --verify-diagnostics %s

func.func @encode_type(%x: tensor<?x8xf16>) {
  // expected-error@+1 {{'spikingbrain.spike_encode' computes in f32}}
  %c, %v = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64} : (tensor<?x8xf16>) -> (tensor<?x8xf16>, tensor<?xf16>)
  return
}

// -----

func.func @encode_channels(%x: tensor<2x?xf32>) {
  // expected-error@+1 {{'spikingbrain.spike_encode' needs a known number of channels, at least one}}
  %c, %v = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64} : (tensor<2x?xf32>) -> (tensor<2x?xf32>, tensor<2xf32>)
  return
}

// -----

func.func @encode_shapes(%x: tensor<?x8xf32>) {
  // expected-error@+1 {{'spikingbrain.spike_encode' counts}}
  %c, %v = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64} : (tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<8xf32>)
  return
}

// -----

func.func @encode_bounds(%x: tensor<?x8xf32>) {
  // expected-error@+1 {{'spikingbrain.spike_encode' needs k > 0 and 0 < lower <= upper}}
  %c, %v = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0 : f64, upper = 0.5 : f64} : (tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?xf32>)
  return
}

// -----

func.func @linear_codes(%c: tensor<?x8xf32>, %v: tensor<?xf32>, %w: tensor<4x8xi8>, %s: tensor<4x1xf32>) {
  // expected-error@+1 {{'spikingbrain.spike_linear' a weight of i8 has no codes of 16 bits}}
  %y = "spikingbrain.spike_linear"(%c, %v, %w, %s) {bits = 16 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<4x8xi8>, tensor<4x1xf32>) -> tensor<?x4xf32>
  return
}

// -----

func.func @linear_weight(%c: tensor<?x8xf32>, %v: tensor<?xf32>, %w: tensor<8x4xi8>, %s: tensor<8x1xf32>) {
  // expected-error@+1 {{'spikingbrain.spike_linear' weight [8, 4] must be [N, K] for counts}}
  %y = "spikingbrain.spike_linear"(%c, %v, %w, %s) {bits = 8 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<8x4xi8>, tensor<8x1xf32>) -> tensor<?x8xf32>
  return
}

// -----

func.func @linear_groups(%c: tensor<?x8xf32>, %v: tensor<?xf32>, %w: tensor<4x8xi8>, %s: tensor<4x3xf32>) {
  // expected-error@+1 {{'spikingbrain.spike_linear' scale [4, 3] must be [N, G] with G a divisor of K, weight is [4, 8]}}
  %y = "spikingbrain.spike_linear"(%c, %v, %w, %s) {bits = 8 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<4x8xi8>, tensor<4x3xf32>) -> tensor<?x4xf32>
  return
}

// -----

func.func @linear_bias(%c: tensor<?x8xf32>, %v: tensor<?xf32>, %w: tensor<4x8xi8>, %s: tensor<4x1xf32>, %b: tensor<8xf32>) {
  // expected-error@+1 {{'spikingbrain.spike_linear' bias must be [N], got [8] for weight [4, 8]}}
  %y = "spikingbrain.spike_linear"(%c, %v, %w, %s, %b) {bits = 8 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<4x8xi8>, tensor<4x1xf32>, tensor<8xf32>) -> tensor<?x4xf32>
  return
}

// -----

func.func @linear_rows(%c: tensor<2x8xf32>, %v: tensor<3xf32>, %w: tensor<4x8xi8>, %s: tensor<4x1xf32>) {
  // expected-error@+1 {{'spikingbrain.spike_linear' threshold [3] does not match counts [2, 8]}}
  %y = "spikingbrain.spike_linear"(%c, %v, %w, %s) {bits = 8 : i64} : (tensor<2x8xf32>, tensor<3xf32>, tensor<4x8xi8>, tensor<4x1xf32>) -> tensor<2x4xf32>
  return
}

// -----

func.func @linear_result(%c: tensor<2x8xf32>, %v: tensor<2xf32>, %w: tensor<4x8xi8>, %s: tensor<4x1xf32>) {
  // expected-error@+1 {{'spikingbrain.spike_linear' result [2, 8] does not follow from counts [2, 8] and 4 columns}}
  %y = "spikingbrain.spike_linear"(%c, %v, %w, %s) {bits = 8 : i64} : (tensor<2x8xf32>, tensor<2xf32>, tensor<4x8xi8>, tensor<4x1xf32>) -> tensor<2x8xf32>
  return
}
