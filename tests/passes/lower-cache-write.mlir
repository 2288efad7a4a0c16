// RUN: spikingbrain opt -p lower-cache-write --target x86-64-v3 %s | filecheck %s
// RUN: spikingbrain opt -p lower-cache-write --target maca %s | filecheck %s --check-prefixes=CHECK,WAVES
// RUN: spikingbrain opt -p lower-cache-write --target vulkan %s | filecheck %s --check-prefix=GATHER

!cache = tensor<2x6x3x8xf32>
!rows = tensor<2x?x3x8xf32>

// With vector kernels: a launch whose result is the cache itself, updated in place (tied to input 0).
// Else each slot looks up the last row that is meant for it, and keeps its content where there is none.
// WAVES: func.func private @cache_write{{.*}} attributes {spikingbrain.threads = 64 : i64}
// CHECK-LABEL: func.func @write(
// GATHER-LABEL: func.func @write(
// CHECK-SAME:      %[[CACHE:[a-z0-9]+]]: tensor<2x6x3x8xf32>
// GATHER-SAME:      %[[CACHE:[a-z0-9]+]]: tensor<2x6x3x8xf32>, %[[ROWS:[a-z0-9]+]]: tensor<2x?x3x8xf32>, %[[SLOTS:[a-z0-9]+]]: tensor<2x?xi64>)
func.func @write(%cache: !cache, %rows: !rows, %slots: tensor<2x?xi64>) -> !cache {
  // CHECK:         %[[NEW:.+]] = "spikingbrain_control.launch"({{.*}}%[[CACHE]], {{.*}}) {callee = @cache_write{{[a-z0-9_]*}}, tied = [0]}
  // CHECK:         return %[[NEW]]
  // GATHER:        linalg.generic {{.*}}"reduction"]} ins(%[[SLOTS]] : tensor<2x?xi64>)
  // GATHER:          %[[SAME:.+]] = arith.cmpi eq, %[[SLOT:.+]], %{{.+}} : i64
  // GATHER:          %[[TIME:.+]] = arith.select %[[SAME]]
  // GATHER:          arith.maxsi %{{.+}}, %[[TIME]]
  // GATHER:        linalg.generic {{.*}}ins(%{{.+}}, %[[CACHE]] : tensor<2x6xi64>, tensor<2x6x3x8xf32>)
  // GATHER:          %[[WRITTEN:.+]] = arith.cmpi sge
  // GATHER:          %[[ROW:.+]] = tensor.extract %[[ROWS]]
  // GATHER:          arith.select %[[WRITTEN]], %[[ROW]], %{{.+}} : f32
  %new = "spikingbrain.cache_write"(%cache, %rows, %slots) : (!cache, !rows, tensor<2x?xi64>) -> !cache
  return %new : !cache
}

// The old cache is read after the write: the write moves behind the reading, to happen in place.
// CHECK-LABEL: func.func @read_afterwards(
// CHECK:         arith.addf
// CHECK:         spikingbrain_control.launch
// CHECK-NEXT:    return
func.func @read_afterwards(%cache: !cache, %rows: !rows, %slots: tensor<2x?xi64>) -> (!cache, !cache) {
  %new = "spikingbrain.cache_write"(%cache, %rows, %slots) : (!cache, !rows, tensor<2x?xi64>) -> !cache
  %twice = arith.addf %cache, %cache : !cache
  return %twice, %new : !cache, !cache
}

// The new cache is read too: the write stays where it is.
// CHECK-LABEL: func.func @new_one_read(
// CHECK:         spikingbrain_control.launch
// CHECK:         arith.addf
func.func @new_one_read(%cache: !cache, %rows: !rows, %slots: tensor<2x?xi64>) -> (!cache, !cache) {
  %new = "spikingbrain.cache_write"(%cache, %rows, %slots) : (!cache, !rows, tensor<2x?xi64>) -> !cache
  %sum = arith.addf %cache, %new : !cache
  return %sum, %new : !cache, !cache
}
