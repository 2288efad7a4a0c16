// RUN: spikingbrain opt -p lower-linear --target x86-64-v3 %s | filecheck %s

// A packed weight: batch and time become rows, and the kernel runs over its blocks of columns.
// CHECK:       func.func private @[[KERNEL:linear_k4_n40_m]](
// CHECK-LABEL: func.func @packed(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: tensor<1x?x4xf32>, %[[W:[a-z0-9]+]]:
func.func @packed(%x: tensor<1x?x4xf32>, %w: tensor<3x4x16xf32>) -> tensor<1x?x40xf32> {
  // CHECK:         %[[ROWS:.+]] = tensor.collapse_shape %[[X]] {{\[\[}}0, 1], [2]] : tensor<1x?x4xf32> into tensor<?x4xf32>
  // CHECK:         %[[Y:.+]] = "spikingbrain_control.launch"({{.*}}%[[ROWS]], %[[W]]{{.*}}) {callee = @[[KERNEL]], tied = [-1]}
  // CHECK:         %[[T:.+]] = tensor.dim %[[X]], %c1
  // CHECK:         %[[R:.+]] = tensor.expand_shape %[[Y]] {{\[\[}}0, 1], [2]] output_shape [1, %[[T]], 40]
  // CHECK:         return %[[R]]
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<1x?x4xf32>, tensor<3x4x16xf32>) -> tensor<1x?x40xf32>
  return %y : tensor<1x?x40xf32>
}

// A plain weight: a product in linalg, with the weight transposed by its map.
// CHECK-LABEL: func.func @plain(
// CHECK-NOT:     launch
// CHECK:         %[[EMPTY:.+]] = tensor.empty(%{{.+}}) : tensor<?x40xf32>
// CHECK:         %[[INIT:.+]] = linalg.fill ins(%{{.+}} : f32) outs(%[[EMPTY]]
// CHECK:         linalg.generic {{.*}}iterator_types = ["parallel", "parallel", "reduction"]{{.*}}outs(%[[INIT]]
// CHECK:           arith.mulf
// CHECK:           arith.addf
func.func @plain(%x: tensor<?x4xf32>, %w: tensor<40x4xf32>) -> tensor<?x40xf32> {
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<40x4xf32>) -> tensor<?x40xf32>
  return %y : tensor<?x40xf32>
}

// One vector is a row on its own.
// CHECK-LABEL: func.func @vector(
// CHECK:         tensor.expand_shape %{{.+}} {{\[\[}}0, 1]] output_shape [1, 4] : tensor<4xf32> into tensor<1x4xf32>
// CHECK:         linalg.generic
// CHECK:         tensor.collapse_shape %{{.+}} {{\[\[}}0, 1]] : tensor<1x40xf32> into tensor<40xf32>
func.func @vector(%x: tensor<4xf32>, %w: tensor<40x4xf32>) -> tensor<40xf32> {
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<4xf32>, tensor<40x4xf32>) -> tensor<40xf32>
  return %y : tensor<40xf32>
}

#same = affine_map<(d0, d1) -> (d0, d1)>

// A sum with another tensor is what the kernel's accumulators start from.
// CHECK-LABEL: func.func @residual(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: tensor<?x4xf32>, %[[W:[a-z0-9]+]]: tensor<3x4x16xf32>, %[[R:[a-z0-9]+]]: tensor<?x40xf32>
// CHECK-NOT:     linalg.generic
// CHECK:         %[[Y:.+]] = "spikingbrain_control.launch"({{.*}}%[[X]], %[[W]], %[[R]]{{.*}}_residual
// CHECK:         return %[[Y]]
func.func @residual(%x: tensor<?x4xf32>, %w: tensor<3x4x16xf32>, %r: tensor<?x40xf32>, %out: tensor<?x40xf32>) -> tensor<?x40xf32> {
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x4x16xf32>) -> tensor<?x40xf32>
  %s = linalg.generic {indexing_maps = [#same, #same, #same], iterator_types = ["parallel", "parallel"]}
      ins(%r, %y : tensor<?x40xf32>, tensor<?x40xf32>) outs(%out : tensor<?x40xf32>) {
  ^bb0(%a: f32, %b: f32, %o: f32):
    %c = arith.addf %a, %b : f32
    linalg.yield %c : f32
  } -> tensor<?x40xf32>
  return %s : tensor<?x40xf32>
}

// The projection's own result is needed as well: the sum stays.
// CHECK-LABEL: func.func @residual_and_result(
// CHECK-NOT:     _residual
// CHECK:         linalg.generic
func.func @residual_and_result(%x: tensor<?x4xf32>, %w: tensor<3x4x16xf32>, %r: tensor<?x40xf32>, %out: tensor<?x40xf32>) -> (tensor<?x40xf32>, tensor<?x40xf32>) {
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x4x16xf32>) -> tensor<?x40xf32>
  %s = linalg.generic {indexing_maps = [#same, #same, #same], iterator_types = ["parallel", "parallel"]}
      ins(%r, %y : tensor<?x40xf32>, tensor<?x40xf32>) outs(%out : tensor<?x40xf32>) {
  ^bb0(%a: f32, %b: f32, %o: f32):
    %c = arith.addf %a, %b : f32
    linalg.yield %c : f32
  } -> tensor<?x40xf32>
  return %s, %y : tensor<?x40xf32>, tensor<?x40xf32>
}

// A difference is no sum.
// CHECK-LABEL: func.func @difference(
// CHECK-NOT:     _residual
// CHECK:         arith.subf
func.func @difference(%x: tensor<?x4xf32>, %w: tensor<3x4x16xf32>, %r: tensor<?x40xf32>, %out: tensor<?x40xf32>) -> tensor<?x40xf32> {
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x4x16xf32>) -> tensor<?x40xf32>
  %s = linalg.generic {indexing_maps = [#same, #same, #same], iterator_types = ["parallel", "parallel"]}
      ins(%r, %y : tensor<?x40xf32>, tensor<?x40xf32>) outs(%out : tensor<?x40xf32>) {
  ^bb0(%a: f32, %b: f32, %o: f32):
    %c = arith.subf %a, %b : f32
    linalg.yield %c : f32
  } -> tensor<?x40xf32>
  return %s : tensor<?x40xf32>
}

// A weight of 16 bits: rows are made f32, the result is rounded once, and a sum stays behind it.
// CHECK-LABEL: func.func @half(
// CHECK:         arith.extf %{{.+}} : bf16 to f32
// CHECK:         "spikingbrain_control.launch"({{.*}}callee = @linear_bf16_k4_n40_m, {{.*}}tensor<3x4x16xbf16>{{.*}} -> tensor<?x40xf32>
// CHECK:         arith.truncf %{{.+}} : f32 to bf16
// CHECK:         arith.addf %{{.+}} : bf16
func.func @half(%x: tensor<?x4xbf16>, %w: tensor<3x4x16xbf16>, %r: tensor<?x40xbf16>, %out: tensor<?x40xbf16>) -> tensor<?x40xbf16> {
  %y = "spikingbrain.linear"(%x, %w) {columns = 40 : i64} : (tensor<?x4xbf16>, tensor<3x4x16xbf16>) -> tensor<?x40xbf16>
  %s = linalg.generic {indexing_maps = [#same, #same, #same], iterator_types = ["parallel", "parallel"]}
      ins(%r, %y : tensor<?x40xbf16>, tensor<?x40xbf16>) outs(%out : tensor<?x40xbf16>) {
  ^bb0(%a: bf16, %b: bf16, %o: bf16):
    %c = arith.addf %a, %b : bf16
    linalg.yield %c : bf16
  } -> tensor<?x40xbf16>
  return %s : tensor<?x40xbf16>
}
