// RUN: spikingbrain opt -p decompose-attention %s | filecheck %s
// RUN: spikingbrain opt -p decompose-attention --verify-diagnostics %s

!q = !torch.vtensor<[1,4,?,16],f32>
!kv = !torch.vtensor<[1,2,?,16],f32>
!mask = !torch.vtensor<[1,1,?,?],i1>
!bias = !torch.vtensor<[1,1,?,?],f32>

// A boolean mask puts -inf where it is false; a row that sees nothing yields 0 (_safe_softmax).
// The root of the scale, 1 / sqrt(16), goes to both factors.
// CHECK-LABEL: func.func @boolean_mask(
// CHECK-SAME:      %[[Q:[a-z0-9]+]]: {{[^%]+}}, %[[K:[a-z0-9]+]]: {{[^%]+}}, %[[V:[a-z0-9]+]]: {{[^%]+}}, %[[MASK:[a-z0-9]+]]:
func.func @boolean_mask(%q: !q, %k: !q, %v: !q, %mask: !mask) -> !q {
  %zero = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  // CHECK:         %[[ROOT:.+]] = torch.constant.float 5.000000e-01
  // CHECK:         %[[Q1:.+]] = torch.aten.mul.Scalar %[[Q]], %[[ROOT]]
  // CHECK:         %[[K1:.+]] = torch.aten.mul.Scalar %[[K]], %[[ROOT]]
  // CHECK:         %[[K2:.+]] = torch.aten.transpose.int %[[K1]]
  // CHECK:         %[[SCORES:.+]] = torch.aten.matmul %[[Q1]], %[[K2]]
  // CHECK:         torch.constant.float 0xFFF0000000000000
  // CHECK:         %[[LOW:.+]] = torch.aten.scalar_tensor
  // CHECK:         %[[SEEN:.+]] = torch.aten.where.self %[[MASK]], %[[SCORES]], %[[LOW]]
  // CHECK:         %[[P:.+]] = torch.aten._safe_softmax %[[SEEN]]
  // CHECK:         %[[O:.+]] = torch.aten.matmul %[[P]], %[[V]]
  // CHECK-NOT:     scaled_dot_product_attention
  // CHECK:         return %[[O]]
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, %zero, %false, %none, %false
      : !q, !q, !q, !mask, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// A mask of floats is added.
// CHECK-LABEL: func.func @additive_mask(
// CHECK:         %[[SCORES:.+]] = torch.aten.matmul
// CHECK:         torch.aten.add.Tensor %[[SCORES]], %{{.+}}, %{{.+}}
// CHECK-NOT:     torch.aten.where
// CHECK:         return
func.func @additive_mask(%q: !q, %k: !q, %v: !q, %mask: !bias) -> !q {
  %zero = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, %zero, %false, %none, %false
      : !q, !q, !q, !bias, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// No mask, a given scale.
// CHECK-LABEL: func.func @no_mask(
// CHECK:         torch.constant.float 3.000000e+00
// CHECK-NOT:     torch.aten.where
// CHECK-NOT:     torch.aten.add
// CHECK:         torch.aten._safe_softmax
func.func @no_mask(%q: !q, %k: !q, %v: !q) -> !q {
  %zero = torch.constant.float 0.000000e+00
  %nine = torch.constant.float 9.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %none, %zero, %false, %nine, %false
      : !q, !q, !q, !torch.none, !torch.float, !torch.bool, !torch.float, !torch.bool -> !q
  return %o : !q
}

// is_causal is a triangle that begins at the first key.
// CHECK-LABEL: func.func @causal(
// CHECK:         %[[ONES:.+]] = torch.aten.ones {{.*}} -> !torch.vtensor<[?,?],i1>
// CHECK:         %[[TRIANGLE:.+]] = torch.aten.tril %[[ONES]]
// CHECK:         torch.aten.where.self %[[TRIANGLE]]
func.func @causal(%q: !q, %k: !q, %v: !q) -> !q {
  %zero = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %true = torch.constant.bool true
  %none = torch.constant.none
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %none, %zero, %true, %none, %false
      : !q, !q, !q, !torch.none, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// Two heads of keys for four of queries: each is repeated in place, without a reshape of dynamic dimensions.
// CHECK-LABEL: func.func @grouped(
// CHECK:         torch.aten.expand {{.*}} -> !torch.vtensor<[1,2,2,?,16],f32>
// CHECK:         tensor.collapse_shape {{.*}} {{\[\[}}0], [1, 2], [3], [4]] : tensor<1x2x2x?x16xf32> into tensor<1x4x?x16xf32>
// CHECK:         torch.aten.expand {{.*}} -> !torch.vtensor<[1,2,2,?,16],f32>
// CHECK:         torch.aten.matmul
func.func @grouped(%q: !q, %k: !kv, %v: !kv) -> !q {
  %zero = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %true = torch.constant.bool true
  %none = torch.constant.none
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %none, %zero, %false, %none, %true
      : !q, !kv, !kv, !torch.none, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// Dropout stays as it is, to be refused with the user's line by lower-torch.
// CHECK-LABEL: func.func @dropout(
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @dropout(%q: !q, %k: !q, %v: !q) -> !q {
  %half = torch.constant.float 5.000000e-01
  %false = torch.constant.bool false
  %none = torch.constant.none
  // expected-remark@+1 {{decompose-attention: dropout, or not [B, H, T, D]}}
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %none, %half, %false, %none, %false
      : !q, !q, !q, !torch.none, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// Without an axis of heads likewise.
// CHECK-LABEL: func.func @rank_3(
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @rank_3(%q: !torch.vtensor<[1,?,16],f32>) -> !torch.vtensor<[1,?,16],f32> {
  %zero = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  // expected-remark@+1 {{decompose-attention: dropout, or not [B, H, T, D]}}
  %o = torch.aten.scaled_dot_product_attention %q, %q, %q, %none, %zero, %false, %none, %false
      : !torch.vtensor<[1,?,16],f32>, !torch.vtensor<[1,?,16],f32>, !torch.vtensor<[1,?,16],f32>, !torch.none, !torch.float, !torch.bool, !torch.none, !torch.bool -> !torch.vtensor<[1,?,16],f32>
  return %o : !torch.vtensor<[1,?,16],f32>
}
