// RUN: spikingbrain opt --split-input-file --verify-diagnostics %s

// What each op refuses; the valid forms are the examples of docs/dialect.md, which tests/unit/test_dialect.py runs.

func.func @parameter_without_source() {
  // expected-error@+1 {{'spikingbrain.parameter' needs at least one source tensor}}
  %w = "spikingbrain.parameter"() {sources = [], recipe = []} : () -> tensor<4xf32>
  return
}

// -----

func.func @parameter_step_as_number() {
  // expected-error@+1 {{'spikingbrain.parameter' lists sources and recipe steps as strings}}
  %w = "spikingbrain.parameter"() {sources = ["w"], recipe = [1]} : () -> tensor<4xf32>
  return
}

// -----

func.func @linear_rank(%x: tensor<3x4xf32>, %w: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain.linear' weight must be [N, K] or [N/block, K, block], got rank 1}}
  %y = "spikingbrain.linear"(%x, %w) {columns = 6 : i64} : (tensor<3x4xf32>, tensor<4xf32>) -> tensor<3x6xf32>
  return
}

// -----

func.func @linear_columns(%x: tensor<3x4xf32>, %w: tensor<6x4xf32>) {
  // expected-error@+1 {{'spikingbrain.linear' weight stores 6 columns, columns = 5}}
  %y = "spikingbrain.linear"(%x, %w) {columns = 5 : i64} : (tensor<3x4xf32>, tensor<6x4xf32>) -> tensor<3x5xf32>
  return
}

// -----

func.func @linear_packed_columns(%x: tensor<3x4xf32>, %w: tensor<1x4x16xf32>) {
  // expected-error@+1 {{'spikingbrain.linear' weight stores 16 columns, columns = 17}}
  %y = "spikingbrain.linear"(%x, %w) {columns = 17 : i64} : (tensor<3x4xf32>, tensor<1x4x16xf32>) -> tensor<3x17xf32>
  return
}

// -----

func.func @linear_channels(%x: tensor<3x5xf32>, %w: tensor<6x4xf32>) {
  // expected-error@+1 {{'spikingbrain.linear' input has 5 channels, weight has 4}}
  %y = "spikingbrain.linear"(%x, %w) {columns = 6 : i64} : (tensor<3x5xf32>, tensor<6x4xf32>) -> tensor<3x6xf32>
  return
}

// -----

func.func @linear_result(%x: tensor<3x4xf32>, %w: tensor<6x4xf32>) {
  // expected-error@+1 {{'spikingbrain.linear' result shape [2, 6] does not follow from [3, 4] and 6 columns}}
  %y = "spikingbrain.linear"(%x, %w) {columns = 6 : i64} : (tensor<3x4xf32>, tensor<6x4xf32>) -> tensor<2x6xf32>
  return
}

// -----

func.func @linear_without_columns(%x: tensor<3x4xf32>, %w: tensor<6x4xf32>) {
  // expected-error@+1 {{attribute "columns" is expected but not provided}}
  %y = "spikingbrain.linear"(%x, %w) : (tensor<3x4xf32>, tensor<6x4xf32>) -> tensor<3x6xf32>
  return
}

// -----

func.func @linear_of_a_number(%x: f32, %w: tensor<6x4xf32>) {
  // expected-error@+1 {{expected base type 'builtin.tensor' but got 'builtin.f32'}}
  %y = "spikingbrain.linear"(%x, %w) {columns = 6 : i64} : (f32, tensor<6x4xf32>) -> tensor<3x6xf32>
  return
}

// -----

func.func @embedding_rank(%ids: tensor<3xi64>, %table: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain.embedding' table must be [rows, K] or [rows/block, K, block], got rank 1}}
  %y = "spikingbrain.embedding"(%ids, %table) {rows = 4 : i64} : (tensor<3xi64>, tensor<4xf32>) -> tensor<3x4xf32>
  return
}

// -----

func.func @embedding_rows(%ids: tensor<3xi64>, %table: tensor<8x4xf32>) {
  // expected-error@+1 {{'spikingbrain.embedding' table stores 8 rows, rows = 9}}
  %y = "spikingbrain.embedding"(%ids, %table) {rows = 9 : i64} : (tensor<3xi64>, tensor<8x4xf32>) -> tensor<3x4xf32>
  return
}

// -----

func.func @embedding_result(%ids: tensor<3xi64>, %table: tensor<8x4xf32>) {
  // expected-error@+1 {{'spikingbrain.embedding' result shape [3, 5] does not follow from ids [3] and rows of 4}}
  %y = "spikingbrain.embedding"(%ids, %table) {rows = 8 : i64} : (tensor<3xi64>, tensor<8x4xf32>) -> tensor<3x5xf32>
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x2x8xf32>
func.func @attention_result(%q: !q, %i: tensor<1x3xi64>, %k: !kv, %j: tensor<1x5xi64>) {
  // expected-error@+1 {{'spikingbrain.attention' query and result must both be [B, T, H, D]}}
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j)
      {scale = 1.0 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (!q, tensor<1x3xi64>, !kv, !kv, tensor<1x5xi64>) -> tensor<1x4x3x8xf32>
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x2x8xf32>
func.func @attention_small_positions(%q: !q, %i: tensor<1x3xi32>, %k: !kv, %j: tensor<1x5xi32>) {
  // expected-error@+1 {{'spikingbrain.attention' positions must be i64}}
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j)
      {scale = 1.0 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (!q, tensor<1x3xi32>, !kv, !kv, tensor<1x5xi32>) -> !q
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x2x8xf32>
func.func @attention_query_positions(%q: !q, %i: tensor<1x1xi64>, %k: !kv, %j: tensor<1x5xi64>) {
  // expected-error@+1 {{'spikingbrain.attention' query positions [1, 1] do not match queries [1, 3, 4, 8]}}
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j)
      {scale = 1.0 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (!q, tensor<1x1xi64>, !kv, !kv, tensor<1x5xi64>) -> !q
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x2x8xf32>
func.func @attention_negative_window(%q: !q, %i: tensor<1x3xi64>, %k: !kv, %j: tensor<1x5xi64>) {
  // expected-error@+1 {{'spikingbrain.attention' window and sinks must not be negative}}
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j)
      {scale = 1.0 : f64, window = -1 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (!q, tensor<1x3xi64>, !kv, !kv, tensor<1x5xi64>) -> !q
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x2x8xf32>
func.func @attention_half_a_cache(%q: !q, %i: tensor<1x3xi64>, %k: !kv, %j: tensor<1x5xi64>) {
  // expected-error@+1 {{'spikingbrain.attention' needs cache keys, values and positions together}}
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j, %k)
      {scale = 1.0 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 1, 0, 0, 0, 0>}
      : (!q, tensor<1x3xi64>, !kv, !kv, tensor<1x5xi64>, !kv) -> !q
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x2x8xf32>
!codes = tensor<1x5x2x8xi8>
func.func @attention_codes_without_scales(%q: !q, %i: tensor<1x3xi64>, %k: !kv, %j: tensor<1x5xi64>, %c: !codes, %s: tensor<1x5x2xf32>) {
  // expected-error@+1 {{'spikingbrain.attention' codes of 8 bits, and nothing else, need scales}}
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j, %c, %c, %j, %s)
      {scale = 1.0 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 1, 1, 1, 1, 0>}
      : (!q, tensor<1x3xi64>, !kv, !kv, tensor<1x5xi64>, !codes, !codes, tensor<1x5xi64>, tensor<1x5x2xf32>) -> !q
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x2x8xf32>
!codes = tensor<1x5x2x8xi8>
func.func @attention_scales(%q: !q, %i: tensor<1x3xi64>, %k: !kv, %j: tensor<1x5xi64>, %c: !codes, %s: tensor<1x5xf32>) {
  // expected-error@+1 {{'spikingbrain.attention' scales must be f32, one for each of [1, 5, 2]}}
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j, %c, %k, %j, %s)
      {scale = 1.0 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 1, 1, 1, 1, 0>}
      : (!q, tensor<1x3xi64>, !kv, !kv, tensor<1x5xi64>, !codes, !kv, tensor<1x5xi64>, tensor<1x5xf32>) -> !q
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x2x8xf32>
func.func @attention_values(%q: !q, %i: tensor<1x3xi64>, %k: !kv, %v: tensor<1x6x2x8xf32>, %j: tensor<1x5xi64>) {
  // expected-error@+1 {{'spikingbrain.attention' keys and values must both be [B, S, Hk, D]}}
  %o = "spikingbrain.attention"(%q, %i, %k, %v, %j)
      {scale = 1.0 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (!q, tensor<1x3xi64>, !kv, tensor<1x6x2x8xf32>, tensor<1x5xi64>) -> !q
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x3x8xf32>
func.func @attention_heads(%q: !q, %i: tensor<1x3xi64>, %k: !kv, %j: tensor<1x5xi64>) {
  // expected-error@+1 {{'spikingbrain.attention' keys [1, 5, 3, 8] do not fit queries [1, 3, 4, 8]: batch, grouped heads, head size}}
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j)
      {scale = 1.0 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (!q, tensor<1x3xi64>, !kv, !kv, tensor<1x5xi64>) -> !q
  return
}

// -----

!q = tensor<1x3x4x8xf32>
!kv = tensor<1x5x2x8xf32>
func.func @attention_key_positions(%q: !q, %i: tensor<1x3xi64>, %k: !kv, %j: tensor<1x6xi64>) {
  // expected-error@+1 {{'spikingbrain.attention' key positions [1, 6] do not match keys [1, 5, 2, 8]}}
  %o = "spikingbrain.attention"(%q, %i, %k, %k, %j)
      {scale = 1.0 : f64, window = 0 : i64, sinks = 0 : i64, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>}
      : (!q, tensor<1x3xi64>, !kv, !kv, tensor<1x6xi64>) -> !q
  return
}

// -----

func.func @cache_write_result(%c: tensor<2x6x8xf32>, %r: tensor<2x3x8xf32>, %s: tensor<2x3xi64>) {
  // expected-error@+1 {{'spikingbrain.cache_write' result must have the type of the cache}}
  %n = "spikingbrain.cache_write"(%c, %r, %s) : (tensor<2x6x8xf32>, tensor<2x3x8xf32>, tensor<2x3xi64>) -> tensor<2x7x8xf32>
  return
}

// -----

func.func @cache_write_rows(%c: tensor<2x6x8xf32>, %r: tensor<2x3x4xf32>, %s: tensor<2x3xi64>) {
  // expected-error@+1 {{'spikingbrain.cache_write' rows [2, 3, 4] do not fit a cache of [2, 6, 8]}}
  %n = "spikingbrain.cache_write"(%c, %r, %s) : (tensor<2x6x8xf32>, tensor<2x3x4xf32>, tensor<2x3xi64>) -> tensor<2x6x8xf32>
  return
}

// -----

func.func @cache_write_slots(%c: tensor<2x6x8xf32>, %r: tensor<2x3x8xf32>, %s: tensor<2x4xi64>) {
  // expected-error@+1 {{'spikingbrain.cache_write' slots [2, 4] do not match rows [2, 3, 8]}}
  %n = "spikingbrain.cache_write"(%c, %r, %s) : (tensor<2x6x8xf32>, tensor<2x3x8xf32>, tensor<2x4xi64>) -> tensor<2x6x8xf32>
  return
}

// -----

func.func @cache_write_types(%c: tensor<2x6x8xf32>, %r: tensor<2x3x8xf16>, %s: tensor<2x3xi64>) {
  // expected-error@+1 {{'spikingbrain.cache_write' slots must be i64, rows of the cache's element type}}
  %n = "spikingbrain.cache_write"(%c, %r, %s) : (tensor<2x6x8xf32>, tensor<2x3x8xf16>, tensor<2x3xi64>) -> tensor<2x6x8xf32>
  return
}

// -----

func.func @loop_attributes(%s: tensor<f32>, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.time_loop' op needs the attributes carried and reverse}}
  %r = "spikingbrain_control.time_loop"(%s, %x) ({
  ^bb0(%a: tensor<f32>, %b: tensor<f32>):
    "spikingbrain_control.yield"(%a) : (tensor<f32>) -> ()
  }) {carried = 1 : i64} : (tensor<f32>, tensor<4xf32>) -> tensor<f32>
  return
}

// -----

func.func @loop_without_time(%s: tensor<f32>) {
  // expected-error@+1 {{'spikingbrain_control.time_loop' op needs a scanned tensor: its first axis is the time axis}}
  %r = "spikingbrain_control.time_loop"(%s) ({
  ^bb0(%a: tensor<f32>):
    "spikingbrain_control.yield"(%a) : (tensor<f32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<f32>) -> tensor<f32>
  return
}

// -----

func.func @loop_final_type(%s: tensor<f32>, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.time_loop' op final values must have the types of the carried ones}}
  %r = "spikingbrain_control.time_loop"(%s, %x) ({
  ^bb0(%a: tensor<f32>, %b: tensor<f32>):
    "spikingbrain_control.yield"(%a) : (tensor<f32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<f32>, tensor<4xf32>) -> tensor<f64>
  return
}

// -----

func.func @loop_times(%s: tensor<f32>, %x: tensor<4xf32>, %y: tensor<5xf32>) {
  // expected-error@+1 {{'spikingbrain_control.time_loop' op time axes differ: 5 and 4}}
  %r = "spikingbrain_control.time_loop"(%s, %x, %y) ({
  ^bb0(%a: tensor<f32>, %b: tensor<f32>, %c: tensor<f32>):
    "spikingbrain_control.yield"(%a) : (tensor<f32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<f32>, tensor<4xf32>, tensor<5xf32>) -> tensor<f32>
  return
}

// -----

func.func @loop_terminator(%s: tensor<f32>, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.time_loop' op body must end in spikingbrain_control.yield}}
  %r = "spikingbrain_control.time_loop"(%s, %x) ({
  ^bb0(%a: tensor<f32>, %b: tensor<f32>):
    "spikingbrain_control.stop"(%a) : (tensor<f32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<f32>, tensor<4xf32>) -> tensor<f32>
  return
}

// -----

func.func @loop_arguments(%s: tensor<f32>, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.time_loop' op body must take every carried value and one slice of every scanned tensor}}
  %r = "spikingbrain_control.time_loop"(%s, %x) ({
  ^bb0(%a: tensor<f32>, %b: tensor<4xf32>):
    "spikingbrain_control.yield"(%a) : (tensor<f32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<f32>, tensor<4xf32>) -> tensor<f32>
  return
}

// -----

func.func @loop_yields(%s: tensor<f32>, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.time_loop' op body must yield every carried value and one slice of every stacked result}}
  %r, %y = "spikingbrain_control.time_loop"(%s, %x) ({
  ^bb0(%a: tensor<f32>, %b: tensor<f32>):
    "spikingbrain_control.yield"(%a) : (tensor<f32>) -> ()
  }) {carried = 1 : i64, reverse = false} : (tensor<f32>, tensor<4xf32>) -> (tensor<f32>, tensor<4xf32>)
  return
}

// -----

func.func @launch_attributes(%g: index, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.launch' op needs the attributes callee and tied}}
  %y = "spikingbrain_control.launch"(%g, %g, %g, %x) {callee = @k} : (index, index, index, tensor<4xf32>) -> tensor<4xf32>
  return
}

// -----

func.func @launch_grid(%g: index, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.launch' op needs three grid sizes}}
  %y = "spikingbrain_control.launch"(%g, %g, %x) {callee = @k, tied = [-1]} : (index, index, tensor<4xf32>) -> tensor<4xf32>
  return
}

// -----

func.func @launch_tied_count(%g: index, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.launch' op needs one entry of tied per result}}
  %y = "spikingbrain_control.launch"(%g, %g, %g, %x) {callee = @k, tied = []} : (index, index, index, tensor<4xf32>) -> tensor<4xf32>
  return
}

// -----

func.func @launch_tied_type(%g: index, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.launch' op a result cannot be tied to input 0}}
  %y = "spikingbrain_control.launch"(%g, %g, %g, %x) {callee = @k, tied = [0]} : (index, index, index, tensor<4xf32>) -> tensor<5xf32>
  return
}

// -----

func.func @launch_sizes(%g: index, %x: tensor<4xf32>) {
  // expected-error@+1 {{'spikingbrain_control.launch' op needs 1 result sizes, got 0}}
  %y = "spikingbrain_control.launch"(%g, %g, %g, %x) {callee = @k, tied = [-1]} : (index, index, index, tensor<4xf32>) -> tensor<?xf32>
  return
}

// -----

func.func @recurrence_axis(%q: tensor<1x?x2x4xf32>, %k: tensor<1x?x1x4xf32>) {
  // expected-error@+1 {{'spikingbrain.linear_recurrence' decay_axis is one of none, head, key, value, not 'time'}}
  %o, %s = "spikingbrain.linear_recurrence"(%q, %k, %k) {decay_axis = "time", log_decay = true, exclusive = false, reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>} : (tensor<1x?x2x4xf32>, tensor<1x?x1x4xf32>, tensor<1x?x1x4xf32>) -> (tensor<1x?x2x4xf32>, tensor<1x1x4x4xf32>)
  return
}

// -----

func.func @recurrence_without_decay(%q: tensor<1x?x2x4xf32>, %k: tensor<1x?x1x4xf32>) {
  // expected-error@+1 {{'spikingbrain.linear_recurrence' decay_axis 'key' without a decay}}
  %o, %s = "spikingbrain.linear_recurrence"(%q, %k, %k) {decay_axis = "key", log_decay = true, exclusive = false, reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>} : (tensor<1x?x2x4xf32>, tensor<1x?x1x4xf32>, tensor<1x?x1x4xf32>) -> (tensor<1x?x2x4xf32>, tensor<1x1x4x4xf32>)
  return
}

// -----

func.func @recurrence_half_a_rank_one_part(%q: tensor<1x?x2x4xf32>, %k: tensor<1x?x1x4xf32>) {
  // expected-error@+1 {{'spikingbrain.linear_recurrence' needs erase and predict together}}
  %o, %s = "spikingbrain.linear_recurrence"(%q, %k, %k, %k) {decay_axis = "none", log_decay = true, exclusive = false, reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 1, 0, 0, 0>} : (tensor<1x?x2x4xf32>, tensor<1x?x1x4xf32>, tensor<1x?x1x4xf32>, tensor<1x?x1x4xf32>) -> (tensor<1x?x2x4xf32>, tensor<1x1x4x4xf32>)
  return
}

// -----

func.func @recurrence_bonus_inclusive(%q: tensor<1x?x2x4xf32>, %k: tensor<1x?x1x4xf32>, %u: tensor<1x4xf32>) {
  // expected-error@+1 {{'spikingbrain.linear_recurrence' has a bonus, which only exclusive reads add}}
  %o, %s = "spikingbrain.linear_recurrence"(%q, %k, %k, %u) {decay_axis = "none", log_decay = true, exclusive = false, reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 1, 0>} : (tensor<1x?x2x4xf32>, tensor<1x?x1x4xf32>, tensor<1x?x1x4xf32>, tensor<1x4xf32>) -> (tensor<1x?x2x4xf32>, tensor<1x1x4x4xf32>)
  return
}

// -----

func.func @recurrence_rank(%q: tensor<1x?x2x4xf32>, %k: tensor<1x?x1x4xf32>, %g: tensor<1x?x1xf32>) {
  // expected-error@+1 {{'spikingbrain.linear_recurrence' decay must be [B, T, S, V]}}
  %o, %s = "spikingbrain.linear_recurrence"(%q, %k, %k, %g) {decay_axis = "value", log_decay = true, exclusive = false, reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 1, 0, 0, 0, 0>} : (tensor<1x?x2x4xf32>, tensor<1x?x1x4xf32>, tensor<1x?x1x4xf32>, tensor<1x?x1xf32>) -> (tensor<1x?x2x4xf32>, tensor<1x1x4x4xf32>)
  return
}

// -----

func.func @recurrence_sizes(%q: tensor<1x?x2x4xf32>, %k: tensor<1x?x1x4xf32>, %v: tensor<1x?x1x6xf32>) {
  // expected-error@+1 {{'spikingbrain.linear_recurrence' o has V = 4, v has 6}}
  %o, %s = "spikingbrain.linear_recurrence"(%q, %k, %v) {decay_axis = "none", log_decay = true, exclusive = false, reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>} : (tensor<1x?x2x4xf32>, tensor<1x?x1x4xf32>, tensor<1x?x1x6xf32>) -> (tensor<1x?x2x4xf32>, tensor<1x1x4x6xf32>)
  return
}

// -----

func.func @recurrence_groups(%q: tensor<1x?x3x4xf32>, %k: tensor<1x?x2x4xf32>) {
  // expected-error@+1 {{'spikingbrain.linear_recurrence' 3 heads cannot read 2 states in equal groups}}
  %o, %s = "spikingbrain.linear_recurrence"(%q, %k, %k) {decay_axis = "none", log_decay = true, exclusive = false, reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 0, 0, 0, 0, 0>} : (tensor<1x?x3x4xf32>, tensor<1x?x2x4xf32>, tensor<1x?x2x4xf32>) -> (tensor<1x?x3x4xf32>, tensor<1x2x4x4xf32>)
  return
}

// -----

func.func @scan_type(%a: tensor<2x?x8xf16>) {
  // expected-error@+1 {{'spikingbrain.linear_scan' decay is f16; the dialect computes in f32 or f64}}
  %h, %s = "spikingbrain.linear_scan"(%a, %a) {log_decay = false, reverse = false, operandSegmentSizes = array<i32: 1, 1, 0>} : (tensor<2x?x8xf16>, tensor<2x?x8xf16>) -> (tensor<2x?x8xf16>, tensor<2x8xf16>)
  return
}

// -----

func.func @selective_scan_types(%x: tensor<2x?x8xf32>, %a: tensor<8x4xf64>, %b: tensor<2x?x4xf32>) {
  // expected-error@+1 {{'spikingbrain.selective_scan' a is f64, x f32}}
  %h, %s = "spikingbrain.selective_scan"(%x, %x, %a, %b, %b) {reverse = false, operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0>} : (tensor<2x?x8xf32>, tensor<2x?x8xf32>, tensor<8x4xf64>, tensor<2x?x4xf32>, tensor<2x?x4xf32>) -> (tensor<2x?x8xf32>, tensor<2x8x4xf32>)
  return
}

// -----

func.func @scan_segments(%a: tensor<2x?x8xf32>) {
  // expected-error@+1 {{'spikingbrain.linear_scan' needs operandSegmentSizes, as its state is optional}}
  %h, %s = "spikingbrain.linear_scan"(%a, %a) {log_decay = false, reverse = false} : (tensor<2x?x8xf32>, tensor<2x?x8xf32>) -> (tensor<2x?x8xf32>, tensor<2x8xf32>)
  return
}

// -----

func.func @grouped_types(%x: tensor<?x4xf32>, %w: tensor<3x40x4xf16>, %e: tensor<?xi64>) {
  // expected-error@+1 {{'spikingbrain.grouped_linear' takes and returns one element type apart from the experts}}
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x40x4xf16>, tensor<?xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @grouped_experts(%x: tensor<?x4xf32>, %w: tensor<3x40x4xf32>, %e: tensor<?xi32>) {
  // expected-error@+1 {{'spikingbrain.grouped_linear' experts are i64, got i32}}
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x40x4xf32>, tensor<?xi32>) -> tensor<?x40xf32>
  return
}

// -----

func.func @grouped_weight(%x: tensor<?x4xf32>, %w: tensor<40x4xf32>, %e: tensor<?xi64>) {
  // expected-error@+1 {{'spikingbrain.grouped_linear' weight must be [N, O, K] or [N, O/block, K, block], got [40, 4]}}
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<40x4xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @grouped_columns(%x: tensor<?x4xf32>, %w: tensor<3x2x4x16xf32>, %e: tensor<?xi64>) {
  // expected-error@+1 {{'spikingbrain.grouped_linear' weight stores 32 columns, columns = 40}}
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<?x4xf32>, tensor<3x2x4x16xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @grouped_channels(%x: tensor<2x5xf32>, %w: tensor<3x40x4xf32>, %e: tensor<?xi64>) {
  // expected-error@+1 {{'spikingbrain.grouped_linear' input [2, 5] must be [R, K] for weight [3, 40, 4]}}
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<2x5xf32>, tensor<3x40x4xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @grouped_rows(%x: tensor<2x4xf32>, %w: tensor<3x40x4xf32>, %e: tensor<3xi64>) {
  // expected-error@+1 {{'spikingbrain.grouped_linear' experts [3] must be [R], one for each row of [2, 4]}}
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<2x4xf32>, tensor<3x40x4xf32>, tensor<3xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @grouped_result(%x: tensor<2x4xf32>, %w: tensor<3x40x4xf32>, %e: tensor<2xi64>) {
  // expected-error@+1 {{'spikingbrain.grouped_linear' result shape [2, 16] does not follow from [2, 4] and 40 columns}}
  %y = "spikingbrain.grouped_linear"(%x, %w, %e) {columns = 40 : i64} : (tensor<2x4xf32>, tensor<3x40x4xf32>, tensor<2xi64>) -> tensor<2x16xf32>
  return
}

// -----

func.func @spike_grouped_types(%c: tensor<?x8xf32>, %v: tensor<?xf32>, %w: tensor<3x40x8xi16>, %s: tensor<3x40x2xf32>, %e: tensor<?xi64>) {
  // expected-error@+1 {{'spikingbrain.spike_grouped_linear' takes f32, f32, i8, f32 and i64 and returns f32, got ['f32', 'f32', 'i16', 'f32', 'i64', 'f32']}}
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {bits = 8 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<3x40x8xi16>, tensor<3x40x2xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @spike_grouped_bits(%c: tensor<?x8xf32>, %v: tensor<?xf32>, %w: tensor<3x40x8xi8>, %s: tensor<3x40x2xf32>, %e: tensor<?xi64>) {
  // expected-error@+1 {{'spikingbrain.spike_grouped_linear' a weight of i8 has no codes of 16 bits}}
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {bits = 16 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<3x40x8xi8>, tensor<3x40x2xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @spike_grouped_weight(%c: tensor<2x8xf32>, %v: tensor<?xf32>, %w: tensor<3x40x4xi8>, %s: tensor<3x40x2xf32>, %e: tensor<?xi64>) {
  // expected-error@+1 {{'spikingbrain.spike_grouped_linear' weight [3, 40, 4] must be [N, O, K] for counts [2, 8]}}
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {bits = 8 : i64} : (tensor<2x8xf32>, tensor<?xf32>, tensor<3x40x4xi8>, tensor<3x40x2xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @spike_grouped_scale(%c: tensor<?x8xf32>, %v: tensor<?xf32>, %w: tensor<3x40x8xi8>, %s: tensor<3x40x3xf32>, %e: tensor<?xi64>) {
  // expected-error@+1 {{'spikingbrain.spike_grouped_linear' scale [3, 40, 3] must be [N, O, G] with G a divisor of K, weight is [3, 40, 8]}}
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {bits = 8 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<3x40x8xi8>, tensor<3x40x3xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @spike_grouped_rows(%c: tensor<2x8xf32>, %v: tensor<2xf32>, %w: tensor<3x40x8xi8>, %s: tensor<3x40x2xf32>, %e: tensor<3xi64>) {
  // expected-error@+1 {{'spikingbrain.spike_grouped_linear' experts [3] must be [R], one for each row of [2, 8]}}
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {bits = 8 : i64} : (tensor<2x8xf32>, tensor<2xf32>, tensor<3x40x8xi8>, tensor<3x40x2xf32>, tensor<3xi64>) -> tensor<?x40xf32>
  return
}

// -----

func.func @spike_grouped_result(%c: tensor<2x8xf32>, %v: tensor<2xf32>, %w: tensor<3x40x8xi8>, %s: tensor<3x40x2xf32>, %e: tensor<2xi64>) {
  // expected-error@+1 {{'spikingbrain.spike_grouped_linear' result [2, 4] does not follow from counts [2, 8] and 40 columns}}
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {bits = 8 : i64} : (tensor<2x8xf32>, tensor<2xf32>, tensor<3x40x8xi8>, tensor<3x40x2xf32>, tensor<2xi64>) -> tensor<2x4xf32>
  return
}
