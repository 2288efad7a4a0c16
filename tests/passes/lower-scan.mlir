// RUN: spikingbrain opt -p lower-scan --target x86-64-v4 --split-input-file %s | filecheck %s
// RUN: spikingbrain opt -p lower-scan --target vulkan --split-input-file %s | filecheck %s --check-prefix PORTABLE
// RUN: spikingbrain opt -p lower-scan --target maca --split-input-file %s | filecheck %s --check-prefix WAVES

// An elementwise recurrence is a pointwise scan; time is not moved to the front. Logarithms of decays are raised within.
// CHECK-DAG:   #[[STATE:.+]] = affine_map<(d0, d1, d2) -> (d1, d2)>
// CHECK-DAG:   #[[ALL:.+]] = affine_map<(d0, d1, d2) -> (d1, d0, d2)>
// CHECK-LABEL: func.func @linear(
// CHECK-SAME:      %[[A:[a-z0-9]+]]: tensor<2x?x64xf32>, %[[U:[a-z0-9]+]]: tensor<2x?x64xf32>)
// CHECK:         %[[ZEROS:.+]] = linalg.fill
// CHECK:         "spikingbrain_control.pointwise_scan"(%[[ZEROS]], %[[A]], %[[U]]) ({
// CHECK:           math.exp
// CHECK-NEXT:      arith.mulf
// CHECK-NEXT:      arith.addf
// CHECK:         backwards = [true, true, true], carried = 1 : i64, maps = [#[[STATE]], #[[ALL]], #[[ALL]], #[[ALL]]]
// PORTABLE-LABEL: func.func @linear(
// PORTABLE:         "spikingbrain_control.pointwise_scan"
func.func @linear(%a: tensor<2x?x64xf32>, %u: tensor<2x?x64xf32>) -> tensor<2x?x64xf32> {
  %h, %last = "spikingbrain.linear_scan"(%a, %u) {log_decay = true, reverse = true, operandSegmentSizes = array<i32: 1, 1, 0>}
       : (tensor<2x?x64xf32>, tensor<2x?x64xf32>) -> (tensor<2x?x64xf32>, tensor<2x64xf32>)
  return %h : tensor<2x?x64xf32>
}

// -----

// The selective scan is a kernel of its own, or a loop in which the decays of one step exist at a time.
// WAVES-LABEL: func.func private @selective_scan_
// WAVES-SAME:    spikingbrain.threads = 64 : i64
// WAVES:         math.exp
// WAVES-LABEL: func.func @selective(
// WAVES:         "spikingbrain_control.launch"
// CHECK-LABEL: func.func private @selective_scan_
// CHECK:         scf.for
// CHECK:           vector.fma
// CHECK-LABEL: func.func @selective(
// CHECK:         "spikingbrain_control.launch"
// CHECK-NOT:     tensor<1x?x64x16xf32>
// PORTABLE-LABEL: func.func @selective(
// PORTABLE:         "spikingbrain_control.time_loop"
// PORTABLE:           math.exp
// PORTABLE-NOT:     tensor<1x?x64x16xf32>
func.func @selective(%x: tensor<1x?x64xf32>, %dt: tensor<1x?x64xf32>, %a: tensor<64x16xf32>, %b: tensor<1x?x16xf32>,
                     %c: tensor<1x?x16xf32>) -> tensor<1x?x64xf32> {
  %y, %last = "spikingbrain.selective_scan"(%x, %dt, %a, %b, %c) {reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0>}
       : (tensor<1x?x64xf32>, tensor<1x?x64xf32>, tensor<64x16xf32>, tensor<1x?x16xf32>, tensor<1x?x16xf32>)
         -> (tensor<1x?x64xf32>, tensor<1x64x16xf32>)
  return %y : tensor<1x?x64xf32>
}
