// RUN: spikingbrain opt -p raise-cache-write %s | filecheck %s
// RUN: spikingbrain opt -p raise-cache-write --verify-diagnostics %s

!cache = !torch.vtensor<[2,6,3,8],f32>
!rows = !torch.vtensor<[2,?,3,8],f32>
!index = !torch.vtensor<[2,?,3,8],si64>
!slots = !torch.vtensor<[2,?],si64>
!slots3 = !torch.vtensor<[2,?,1],si64>
!slots4 = !torch.vtensor<[2,?,1,1],si64>

// cache.scatter(1, slots[:, :, None, None].expand(...), rows): every value of a row goes to the slot of its token.
// CHECK-LABEL: func.func @rows(
// CHECK-SAME:      %[[CACHE:[a-z0-9]+]]: {{[^%]+}}, %[[ROWS:[a-z0-9]+]]: {{[^%]+}}, %[[SLOTS:[a-z0-9]+]]: {{[^%]+}})
func.func @rows(%cache: !cache, %rows: !rows, %slots: !slots) -> !cache {
  %one = torch.constant.int 1
  %two = torch.constant.int 2
  %three = torch.constant.int 3
  %eight = torch.constant.int 8
  %false = torch.constant.bool false
  %time = torch.aten.size.int %slots, %one : !slots, !torch.int -> !torch.int
  %a = torch.aten.unsqueeze %slots, %two : !slots, !torch.int -> !slots3
  %b = torch.aten.unsqueeze %a, %three : !slots3, !torch.int -> !slots4
  %sizes = torch.prim.ListConstruct %two, %time, %three, %eight
      : (!torch.int, !torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %index = torch.aten.expand %b, %sizes, %false : !slots4, !torch.list<int>, !torch.bool -> !index
  // CHECK-DAG:     %[[C:.+]] = torch_c.to_builtin_tensor %[[CACHE]]
  // CHECK-DAG:     %[[R:.+]] = torch_c.to_builtin_tensor %[[ROWS]]
  // CHECK-DAG:     %[[S:.+]] = torch_c.to_builtin_tensor %[[SLOTS]]
  // CHECK:         %[[NEW:.+]] = "spikingbrain.cache_write"(%[[C]], %[[R]], %[[S]])
  // CHECK:         %[[T:.+]] = torch_c.from_builtin_tensor %[[NEW]]
  // CHECK-NOT:     torch.aten.scatter.src
  // CHECK:         return %[[T]]
  %new = torch.aten.scatter.src %cache, %one, %index, %rows : !cache, !torch.int, !index, !rows -> !cache
  return %new : !cache
}

// The cache of positions has no further axes: the slots are the index as they are.
// CHECK-LABEL: func.func @positions(
func.func @positions(%cache: !torch.vtensor<[2,6],si64>, %rows: !slots, %slots: !slots) -> !torch.vtensor<[2,6],si64> {
  %one = torch.constant.int 1
  // CHECK:         "spikingbrain.cache_write"({{.*}}) : (tensor<2x6xi64>, tensor<2x?xi64>, tensor<2x?xi64>) -> tensor<2x6xi64>
  %new = torch.aten.scatter.src %cache, %one, %slots, %rows
      : !torch.vtensor<[2,6],si64>, !torch.int, !slots, !slots -> !torch.vtensor<[2,6],si64>
  return %new : !torch.vtensor<[2,6],si64>
}

// A scatter along the batch.
// CHECK-LABEL: func.func @along_batch(
// CHECK-NOT:     spikingbrain.cache_write
// CHECK:         torch.aten.scatter.src
func.func @along_batch(%cache: !torch.vtensor<[2,6],si64>, %rows: !torch.vtensor<[2,6],si64>) -> !torch.vtensor<[2,6],si64> {
  %zero = torch.constant.int 0
  // expected-remark@+1 {{raise-cache-write: the scatter is not along dim 1}}
  %new = torch.aten.scatter.src %cache, %zero, %rows, %rows
      : !torch.vtensor<[2,6],si64>, !torch.int, !torch.vtensor<[2,6],si64>, !torch.vtensor<[2,6],si64> -> !torch.vtensor<[2,6],si64>
  return %new : !torch.vtensor<[2,6],si64>
}

// The values of one row go to different slots.
// CHECK-LABEL: func.func @own_slot_for_each_value(
// CHECK-NOT:     spikingbrain.cache_write
// CHECK:         torch.aten.scatter.src
func.func @own_slot_for_each_value(%cache: !cache, %rows: !rows, %index: !index) -> !cache {
  %one = torch.constant.int 1
  // expected-remark@+1 {{raise-cache-write: the index differs within a row}}
  %new = torch.aten.scatter.src %cache, %one, %index, %rows : !cache, !torch.int, !index, !rows -> !cache
  return %new : !cache
}

// The slot of one token is repeated over time: not one slot for each row.
// CHECK-LABEL: func.func @one_slot_for_all_rows(
// CHECK-NOT:     spikingbrain.cache_write
// CHECK:         torch.aten.scatter.src
func.func @one_slot_for_all_rows(%cache: !torch.vtensor<[2,6],si64>, %rows: !torch.vtensor<[2,4],si64>,
                                 %slot: !torch.vtensor<[2,1],si64>) -> !torch.vtensor<[2,6],si64> {
  %one = torch.constant.int 1
  %two = torch.constant.int 2
  %four = torch.constant.int 4
  %false = torch.constant.bool false
  %sizes = torch.prim.ListConstruct %two, %four : (!torch.int, !torch.int) -> !torch.list<int>
  %index = torch.aten.expand %slot, %sizes, %false
      : !torch.vtensor<[2,1],si64>, !torch.list<int>, !torch.bool -> !torch.vtensor<[2,4],si64>
  // expected-remark@+1 {{raise-cache-write: the index differs within a row}}
  %new = torch.aten.scatter.src %cache, %one, %index, %rows
      : !torch.vtensor<[2,6],si64>, !torch.int, !torch.vtensor<[2,4],si64>, !torch.vtensor<[2,4],si64> -> !torch.vtensor<[2,6],si64>
  return %new : !torch.vtensor<[2,6],si64>
}

// torch writes rows of the first batch entries only.
// CHECK-LABEL: func.func @part_of_the_batch(
// CHECK-NOT:     spikingbrain.cache_write
// CHECK:         torch.aten.scatter.src
func.func @part_of_the_batch(%cache: !torch.vtensor<[2,6],si64>, %rows: !torch.vtensor<[1,4],si64>,
                             %slots: !torch.vtensor<[1,4],si64>) -> !torch.vtensor<[2,6],si64> {
  %one = torch.constant.int 1
  // expected-remark@+1 {{raise-cache-write: the rows cover part of the batch, or their size is dynamic}}
  %new = torch.aten.scatter.src %cache, %one, %slots, %rows
      : !torch.vtensor<[2,6],si64>, !torch.int, !torch.vtensor<[1,4],si64>, !torch.vtensor<[1,4],si64> -> !torch.vtensor<[2,6],si64>
  return %new : !torch.vtensor<[2,6],si64>
}
