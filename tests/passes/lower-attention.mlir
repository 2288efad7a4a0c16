// RUN: spikingbrain opt -p lower-attention --target x86-64-v3 %s | filecheck %s
// RUN: spikingbrain opt -p lower-attention --target maca %s | filecheck %s --check-prefix=WAVES
// RUN: spikingbrain opt -p lower-attention --target vulkan %s | filecheck %s --check-prefix=PORTABLE

!q = tensor<1x?x4x16xf32>
!new = tensor<1x?x2x16xf32>
!cache = tensor<1x6x2x16xf32>

// With vector kernels: one launch over blocks of queries, the cache as three more inputs.
// CHECK-LABEL: func.func @two_segments(
// CHECK-SAME:      %[[Q:[a-z0-9]+]]: tensor<1x?x4x16xf32>
// PORTABLE-LABEL: func.func @two_segments(
// With waves: the same, in tiles of 16 rows; products are instructions of the matrix units.
// WAVES:         func.func private @attention_prefill_4x2x16_{{.*}} attributes {spikingbrain.threads = 256 : i64}
// WAVES-NOT:     gpu.barrier
// WAVES:         gpu.ballot
// WAVES:         call @__builtin_mxc_mma_16x16x4f32
// WAVES-LABEL: func.func @two_segments(
// WAVES:         %[[BOUNDS:.+]] = "spikingbrain_control.launch"({{.+}}callee = @attention_bounds_
// WAVES:         "spikingbrain_control.launch"({{.+}}%[[BOUNDS]]{{.+}}callee = @attention_prefill_
// WAVES-NOT:     spikingbrain.attention
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

// A cache of f16 keys and of values in codes is read as it is, where the target turns f16 to f32; a table of bounds
// belongs to the new tokens, of which there may be many.
// CHECK-LABEL: func.func @narrow_cache(
// CHECK-SAME:      %[[KC:[a-z0-9]+]]: tensor<1x6x2x16xf16>, %[[VC:[a-z0-9]+]]: tensor<1x6x2x16xi8>
// CHECK:         %[[B:.+]] = "spikingbrain_control.launch"({{.*}}) {callee = @attention_bounds_1xd_{{[0-9]+}}, tied = [-1]}
// CHECK:         "spikingbrain_control.launch"({{.*}}%[[KC]], %[[VC]], {{.*}}%[[B]], {{.*}}) {callee = @attention_prefill_
// PORTABLE-LABEL: func.func @narrow_cache(
// PORTABLE:         arith.sitofp
func.func @narrow_cache(%q: !q, %i: tensor<1x?xi64>, %k: !new, %kc: tensor<1x6x2x16xf16>, %vc: tensor<1x6x2x16xi8>,
                        %jc: tensor<1x6xi64>, %scales: tensor<1x6x2xf32>) -> !q {
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %i, %kc, %vc, %jc, %scales)
      {scale = 0.25 : f64, window = 8 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 1, 1, 1, 0, 1>}
      : (!q, tensor<1x?xi64>, !new, !new, tensor<1x?xi64>, tensor<1x6x2x16xf16>, tensor<1x6x2x16xi8>, tensor<1x6xi64>, tensor<1x6x2xf32>) -> !q
  return %o : !q
}

// The kernels take queries in f32 only, as raise-attention makes them: others go to linalg on every target.
// CHECK-LABEL: func.func @half(
// CHECK-NOT:     launch
// CHECK:         linalg.generic
func.func @half(%q: tensor<1x?x2x16xf16>, %i: tensor<1x?xi64>, %k: tensor<1x6x2x16xf16>, %j: tensor<1x6xi64>) -> tensor<1x?x2x16xf16> {
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j)
      {scale = 0.25 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (tensor<1x?x2x16xf16>, tensor<1x?xi64>, tensor<1x6x2x16xf16>, tensor<1x6x2x16xf16>, tensor<1x6xi64>) -> tensor<1x?x2x16xf16>
  return %o : tensor<1x?x2x16xf16>
}
