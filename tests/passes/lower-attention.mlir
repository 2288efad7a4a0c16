// RUN: spikingbrain opt -p lower-attention --target x86-64-v3 %s | filecheck %s
// RUN: spikingbrain opt -p lower-attention --target vulkan %s | filecheck %s --check-prefix=PORTABLE

!q = tensor<1x?x4x16xf32>
!new = tensor<1x?x2x16xf32>
!cache = tensor<1x6x2x16xf32>

// With vector kernels: one launch over blocks of queries, the cache as three more inputs.
// CHECK-LABEL: func.func @two_segments(
// CHECK-SAME:      %[[Q:[a-z0-9]+]]: tensor<1x?x4x16xf32>
// PORTABLE-LABEL: func.func @two_segments(
func.func @two_segments(%q: !q, %i: tensor<1x?xi64>, %k: !new, %v: !new, %j: tensor<1x?xi64>,
                        %kc: !cache, %vc: !cache, %jc: tensor<1x6xi64>) -> !q {
  // CHECK:         %[[T:.+]] = tensor.dim %[[Q]], %c1
  // CHECK:         %[[O:.+]] = "spikingbrain_control.launch"({{.*}}%[[Q]], {{.*}}, %[[T]]) {callee = @attention_prefill_4x2x16_{{[0-9a-f]+}}, tied = [-1]}
  // CHECK-NOT:     spikingbrain.attention
  // CHECK:         return %[[O]]
  // PORTABLE-NOT:     launch
  // PORTABLE:         linalg.generic
  // PORTABLE:         math.exp
  // PORTABLE:         return
  %o = "spikingbrain.attention"(%q, %i, %k, %v, %j, %kc, %vc, %jc)
      {scale = 0.25 : f64, window = 8 : i64, sinks = 2 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 1, 1, 1, 0, 0>}
      : (!q, tensor<1x?xi64>, !new, !new, tensor<1x?xi64>, !cache, !cache, tensor<1x6xi64>) -> !q
  return %o : !q
}

// One query: the kernel for decoding, without a grid over queries.
// CHECK-LABEL: func.func @decode(
// CHECK:         callee = @attention_decode_4x2x16_
func.func @decode(%q: tensor<1x1x4x16xf32>, %i: tensor<1x1xi64>, %k: !cache, %v: !cache, %j: tensor<1x6xi64>) -> tensor<1x1x4x16xf32> {
  %o = "spikingbrain.attention"(%q, %i, %k, %v, %j)
      {scale = 0.25 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (tensor<1x1x4x16xf32>, tensor<1x1xi64>, !cache, !cache, tensor<1x6xi64>) -> tensor<1x1x4x16xf32>
  return %o : tensor<1x1x4x16xf32>
}

// The kernels take f32 only: half precision goes to linalg on every target.
// CHECK-LABEL: func.func @half(
// CHECK-NOT:     launch
// CHECK:         linalg.generic
func.func @half(%q: tensor<1x?x2x16xf16>, %i: tensor<1x?xi64>, %k: tensor<1x6x2x16xf16>, %j: tensor<1x6xi64>) -> tensor<1x?x2x16xf16> {
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j)
      {scale = 0.25 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (tensor<1x?x2x16xf16>, tensor<1x?xi64>, tensor<1x6x2x16xf16>, tensor<1x6x2x16xf16>, tensor<1x6xi64>) -> tensor<1x?x2x16xf16>
  return %o : tensor<1x?x2x16xf16>
}
