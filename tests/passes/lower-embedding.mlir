// RUN: spikingbrain opt -p lower-embedding %s | filecheck %s

// A plain table: row and column; an id outside the table yields NaN instead of reading beyond it.
// CHECK-LABEL: func.func @plain(
// CHECK-SAME:      %[[IDS:[a-z0-9]+]]: tensor<1x?xi64>, %[[TABLE:[a-z0-9]+]]: tensor<10x4xf32>)
func.func @plain(%ids: tensor<1x?xi64>, %table: tensor<10x4xf32>) -> tensor<1x?x4xf32> {
  // CHECK-DAG:     %[[NAN:.+]] = arith.constant 0x7FC00000 : f32
  // CHECK:         linalg.generic {{.*}}ins(%[[IDS]] : tensor<1x?xi64>)
  // CHECK:           %[[ROW:.+]] = arith.index_cast
  // CHECK:           %[[INSIDE:.+]] = arith.cmpi ult, %[[ROW]], %c10
  // CHECK:           %[[SAFE:.+]] = arith.select %[[INSIDE]], %[[ROW]], %c0
  // CHECK:           %[[COLUMN:.+]] = linalg.index 2
  // CHECK:           %[[VALUE:.+]] = tensor.extract %[[TABLE]][%[[SAFE]], %[[COLUMN]]]
  // CHECK:           arith.select %[[INSIDE]], %[[VALUE]], %[[NAN]]
  %y = "spikingbrain.embedding"(%ids, %table) {rows = 10 : i64} : (tensor<1x?xi64>, tensor<10x4xf32>) -> tensor<1x?x4xf32>
  return %y : tensor<1x?x4xf32>
}

// A packed table: the row is a place within a block.
// CHECK-LABEL: func.func @packed(
// CHECK:         %[[BLOCK:.+]] = arith.divui %{{.+}}, %c16
// CHECK:         %[[PLACE:.+]] = arith.remui %{{.+}}, %c16
// CHECK:         tensor.extract %{{.+}}[%[[BLOCK]], %{{.+}}, %[[PLACE]]] : tensor<1x4x16xf32>
func.func @packed(%ids: tensor<?xi64>, %table: tensor<1x4x16xf32>) -> tensor<?x4xf32> {
  %y = "spikingbrain.embedding"(%ids, %table) {rows = 10 : i64} : (tensor<?xi64>, tensor<1x4x16xf32>) -> tensor<?x4xf32>
  return %y : tensor<?x4xf32>
}
