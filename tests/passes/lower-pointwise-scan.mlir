// RUN: spikingbrain opt -p lower-pointwise-scan --target x86-64-v4 --clean --split-input-file %s | filecheck %s
// RUN: spikingbrain opt -p lower-pointwise-scan --target vulkan --split-input-file %s | filecheck %s --check-prefix PORTABLE
// RUN: spikingbrain opt -p lower-pointwise-scan --target maca --clean --split-input-file %s | filecheck %s --check-prefix WAVES

// One launch; the kernel copies the initial values once, then holds the state of a tile in the final values' memory.
// CHECK:       func.func private @pointwise_scan_{{[0-9a-f]+}}(%{{.+}}: index, %{{.+}}: index, %{{.+}}: index,
// CHECK-SAME:      %[[S0:[a-z0-9]+]]: memref<?xf32>, %[[X:[a-z0-9]+]]: memref<?x?xf32>, %[[LAST:[a-z0-9]+]]: memref<?xf32>, %[[Y:[a-z0-9]+]]: memref<?x?xf32>)
// CHECK:         vector.load %[[S0]]
// CHECK-NEXT:    vector.store %{{.+}}, %[[LAST]]
// CHECK:         scf.for
// CHECK:           vector.load %[[LAST]]
// CHECK-NEXT:      vector.load %[[X]]
// CHECK:           arith.addf %{{.+}}, %{{.+}} : vector<16xf32>
// CHECK:           vector.store %{{.+}}, %[[LAST]]
// CHECK-NEXT:      vector.store %{{.+}}, %[[Y]]
// Threads of waves hold it in registers, and read the elements of eight steps before they compute.
// WAVES:       func.func private @pointwise_scan_{{[0-9a-f]+}}(%{{.+}}: index, %{{.+}}: index, %{{.+}}: index,
// WAVES-SAME:      %[[S0:[a-z0-9]+]]: memref<?xf32>, %[[X:[a-z0-9]+]]: memref<?x?xf32>, %[[LAST:[a-z0-9]+]]: memref<?xf32>, %[[Y:[a-z0-9]+]]: memref<?x?xf32>)
// WAVES-SAME:      spikingbrain.threads = 64 : i64
// WAVES:         scf.if
// WAVES:           memref.load %[[S0]]
// WAVES:           scf.for
// WAVES-COUNT-8:     memref.load %[[X]]
// WAVES:             %[[S1:.+]] = arith.addf
// WAVES-NEXT:        memref.store %[[S1]], %[[Y]]
// WAVES:           scf.for
// WAVES-COUNT-1:     memref.load %[[X]]
// WAVES:           memref.store %{{.+}}, %[[LAST]]
// WAVES-LABEL: func.func @sum(
// WAVES:         "spikingbrain_control.launch"
// CHECK-LABEL: func.func @sum(
// CHECK:         "spikingbrain_control.launch"
// PORTABLE-LABEL: func.func @sum(
// PORTABLE:         "spikingbrain_control.time_loop"
// PORTABLE:           linalg.generic
// PORTABLE:             arith.addf %{{.+}}, %{{.+}} : f32
func.func @sum(%s0: tensor<?xf32>, %xs: tensor<?x?xf32>) -> (tensor<?xf32>, tensor<?x?xf32>) {
  %last, %ys = "spikingbrain_control.pointwise_scan"(%s0, %xs) ({
  ^bb0(%s: f32, %x: f32):
    %s1 = arith.addf %s, %x : f32
    "spikingbrain_control.yield"(%s1, %s1) : (f32, f32) -> ()
  }) {carried = 1 : i64, scanned = 1 : i64, backwards = [false, false],
      maps = [affine_map<(t, n) -> (n)>, affine_map<(t, n) -> (t, n)>, affine_map<(t, n) -> (t, n)>]}
       : (tensor<?xf32>, tensor<?x?xf32>) -> (tensor<?xf32>, tensor<?x?xf32>)
  return %last, %ys : tensor<?xf32>, tensor<?x?xf32>
}

// -----

// Axes that are neighbours everywhere are one; an axis of size 1 is none. No tensor is transposed.
// CHECK-LABEL: func.func @images(
// CHECK-DAG:     tensor.collapse_shape %{{.+}} {{\[}}[0, 1, 2, 3]] : tensor<2x1x3x5xf32> into tensor<30xf32>
// CHECK-DAG:     tensor.collapse_shape %{{.+}} {{\[}}[0], [1, 2, 3, 4]] : tensor<?x2x1x3x5xf32> into tensor<?x30xf32>
// CHECK:         "spikingbrain_control.launch"
// CHECK:         tensor.expand_shape
func.func @images(%s0: tensor<2x1x3x5xf32>, %xs: tensor<?x2x1x3x5xf32>) -> tensor<2x1x3x5xf32> {
  %last = "spikingbrain_control.pointwise_scan"(%s0, %xs) ({
  ^bb0(%s: f32, %x: f32):
    %s1 = arith.addf %s, %x : f32
    "spikingbrain_control.yield"(%s1) : (f32) -> ()
  }) {carried = 1 : i64, scanned = 1 : i64, backwards = [false],
      maps = [affine_map<(t, b, h, w) -> (b, 0, h, w)>, affine_map<(t, b, h, w) -> (t, b, 0, h, w)>]}
       : (tensor<2x1x3x5xf32>, tensor<?x2x1x3x5xf32>) -> tensor<2x1x3x5xf32>
  return %last : tensor<2x1x3x5xf32>
}
