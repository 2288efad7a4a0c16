// RUN: spikingbrain opt -p thread-state %s | filecheck %s

!cache = tensor<6x8xf32>
!rows = tensor<2x8xf32>

// The kernel that reads the cache hands it on: its second result is the cache, and the write takes this one.
// CHECK-LABEL: func.func @read_then_write(
// CHECK-SAME:      %[[Q:[a-z0-9]+]]: tensor<2x8xf32>, %[[CACHE:[a-z0-9]+]]: tensor<6x8xf32>)
func.func @read_then_write(%q: !rows, %cache: !cache) -> (!rows, !cache) {
  %one = arith.constant 1 : index
  // CHECK:         %[[R:.+]]:2 = "spikingbrain_control.launch"({{.*}}%[[Q]], %[[CACHE]]) {callee = @read, tied = [-1, 1]}
  // CHECK-NEXT:    %[[NEW:.+]] = "spikingbrain_control.launch"({{.*}}%[[R]]#1, %[[Q]]) {callee = @write, tied = [0]}
  // CHECK-NEXT:    return %[[R]]#0, %[[NEW]]
  %o = "spikingbrain_control.launch"(%one, %one, %one, %q, %cache) {callee = @read, tied = [-1]}
      : (index, index, index, !rows, !cache) -> !rows
  %new = "spikingbrain_control.launch"(%one, %one, %one, %cache, %q) {callee = @write, tied = [0]}
      : (index, index, index, !cache, !rows) -> !cache
  return %o, %new : !rows, !cache
}

// Two readers: neither could hand the cache on to the other.
// CHECK-LABEL: func.func @two_readers(
// CHECK-COUNT-2: callee = @read_a, tied = [-1]
// CHECK:         callee = @write, tied = [0]
func.func @two_readers(%q: !rows, %cache: !cache) -> (!rows, !rows, !cache) {
  %one = arith.constant 1 : index
  %a = "spikingbrain_control.launch"(%one, %one, %one, %q, %cache) {callee = @read_a, tied = [-1]}
      : (index, index, index, !rows, !cache) -> !rows
  %b = "spikingbrain_control.launch"(%one, %one, %one, %a, %cache) {callee = @read_a, tied = [-1]}
      : (index, index, index, !rows, !cache) -> !rows
  %new = "spikingbrain_control.launch"(%one, %one, %one, %cache, %q) {callee = @write, tied = [0]}
      : (index, index, index, !cache, !rows) -> !cache
  return %a, %b, %new : !rows, !rows, !cache
}

// The old cache is read after the write: it must not change before.
// CHECK-LABEL: func.func @write_then_read(
// CHECK:         callee = @write, tied = [0]
// CHECK:         callee = @read_b, tied = [-1]
func.func @write_then_read(%q: !rows, %cache: !cache) -> (!rows, !cache) {
  %one = arith.constant 1 : index
  %new = "spikingbrain_control.launch"(%one, %one, %one, %cache, %q) {callee = @write, tied = [0]}
      : (index, index, index, !cache, !rows) -> !cache
  %o = "spikingbrain_control.launch"(%one, %one, %one, %q, %cache) {callee = @read_b, tied = [-1]}
      : (index, index, index, !rows, !cache) -> !rows
  return %o, %new : !rows, !cache
}

// A kernel has one signature: where one of its calls has no write behind it, all stay as they are.
// CHECK-LABEL: func.func @not_all_calls(
// CHECK-COUNT-2: callee = @read_c, tied = [-1]
// CHECK:         callee = @write, tied = [0]
func.func @not_all_calls(%q: !rows, %cache: !cache, %other: !cache) -> (!rows, !rows, !cache) {
  %one = arith.constant 1 : index
  %a = "spikingbrain_control.launch"(%one, %one, %one, %q, %cache) {callee = @read_c, tied = [-1]}
      : (index, index, index, !rows, !cache) -> !rows
  %b = "spikingbrain_control.launch"(%one, %one, %one, %q, %other) {callee = @read_c, tied = [-1]}
      : (index, index, index, !rows, !cache) -> !rows
  %new = "spikingbrain_control.launch"(%one, %one, %one, %cache, %q) {callee = @write, tied = [0]}
      : (index, index, index, !cache, !rows) -> !cache
  return %a, %b, %new : !rows, !rows, !cache
}
