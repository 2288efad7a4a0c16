// RUN: spikingbrain opt --split-input-file --verify-diagnostics %s

!x = tensor<1x?x2x8xf32>
!s = tensor<1x2x8x8xf32>
#id = affine_map<(b, t, h, c) -> (b, t, h, c)>

// A recurrence without values.
func.func @parts(%x: !x) -> !x {
  // expected-error@+1 {{has parts ['q', 'k']; they are ['q', 'k', 'v'], then sums and o, if any}}
  %y, %last = "spikingbrain_control.fused_recurrence"(%x, %x) ({
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }, {
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }) {decay_axis = "none", log_decay = false, exclusive = false, reverse = false, parts = ["q", "k"], maps = [#id, #id]}
      : (!x, !x) -> (!x, !s)
  return %y : !x
}

// -----

!x = tensor<1x?x2x8xf32>
!y = tensor<1x?x8x2xf32>
!s = tensor<1x2x8x8xf32>
#id = affine_map<(b, t, h, c) -> (b, t, h, c)>
#across = affine_map<(b, t, h, c) -> (b, t, c, h)>

// Vectors of channels are loaded at once.
func.func @channels_apart(%x: !x, %z: !y) -> !x {
  // expected-error@+1 {{q reads channels that do not lie next to each other, by (d0, d1, d2, d3) -> (d0, d1, d3, d2)}}
  %y, %last = "spikingbrain_control.fused_recurrence"(%z, %x, %x) ({
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }, {
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }, {
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }) {decay_axis = "none", log_decay = false, exclusive = false, reverse = false, parts = ["q", "k", "v"],
      maps = [#across, #id, #id]} : (!y, !x, !x) -> (!x, !s)
  return %y : !x
}

// -----

!x = tensor<1x?x2x8xf32>
!s = tensor<1x2x8x8xf32>
#id = affine_map<(b, t, h, c) -> (b, t, h, c)>
#far = affine_map<(b, t, h, c) -> (b, t, h * 8 + c + 8)>

func.func @outside(%x: !x, %z: tensor<1x?x16xf32>) -> !x {
  // expected-error@+1 {{v reads outside of axis 2 of tensor<1x?x16xf32>, by (d0, d1, d2, d3) -> (d0, d1, d2 * 8 + d3 + 8)}}
  %y, %last = "spikingbrain_control.fused_recurrence"(%x, %x, %z) ({
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }, {
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }, {
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }) {decay_axis = "none", log_decay = false, exclusive = false, reverse = false, parts = ["q", "k", "v"],
      maps = [#id, #id, #far]} : (!x, !x, tensor<1x?x16xf32>) -> (!x, !s)
  return %y : !x
}

// -----

!x = tensor<1x?x2x8xf32>
!s = tensor<1x2x8x8xf32>
#id = affine_map<(b, t, h, c) -> (b, t, h, c)>

func.func @types(%x: !x, %z: tensor<1x?x2x8xbf16>) -> !x {
  // expected-error@+1 {{body of v must yield f32, not bf16}}
  %y, %last = "spikingbrain_control.fused_recurrence"(%x, %x, %z) ({
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }, {
  ^bb0(%a: f32):
    "spikingbrain_control.yield"(%a) : (f32) -> ()
  }, {
  ^bb0(%a: bf16):
    "spikingbrain_control.yield"(%a) : (bf16) -> ()
  }) {decay_axis = "none", log_decay = false, exclusive = false, reverse = false, parts = ["q", "k", "v"],
      maps = [#id, #id, #id]} : (!x, !x, tensor<1x?x2x8xbf16>) -> (!x, !s)
  return %y : !x
}
