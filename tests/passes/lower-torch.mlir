// RUN: not spikingbrain opt -p lower-torch --split-input-file %s 2>%t.err | filecheck %s
// RUN: filecheck %s --check-prefix=ERROR --input-file %t.err

// Torch ops become linalg; an op of ours between casts stays, its casts fold away.
// CHECK-LABEL: func.func @around_ours(
// CHECK-SAME:      %[[X:[a-z0-9]+]]: tensor<?x4xf32>, %[[W:[a-z0-9]+]]: tensor<6x4xf32>) -> tensor<?x6xf32>
func.func @around_ours(%x: !torch.vtensor<[?,4],f32>, %w: tensor<6x4xf32>) -> !torch.vtensor<[?,6],f32> {
  // CHECK-NOT:     torch
  // CHECK:         %[[R:.+]] = linalg.generic {{.*}}ins(%[[X]]
  // CHECK:           math.tanh
  // CHECK:         %[[Y:.+]] = "spikingbrain.linear"(%[[R]], %[[W]])
  // CHECK-NEXT:    return %[[Y]]
  %r = torch.aten.tanh %x : !torch.vtensor<[?,4],f32> -> !torch.vtensor<[?,4],f32>
  %rb = torch_c.to_builtin_tensor %r : !torch.vtensor<[?,4],f32> -> tensor<?x4xf32>
  %y = "spikingbrain.linear"(%rb, %w) {columns = 6 : i64} : (tensor<?x4xf32>, tensor<6x4xf32>) -> tensor<?x6xf32>
  %yt = torch_c.from_builtin_tensor %y : tensor<?x6xf32> -> !torch.vtensor<[?,6],f32>
  return %yt : !torch.vtensor<[?,6],f32>
}

// -----

// An op without a lowering names the user's line.
// ERROR:      no lowering for torch.aten.multinomial at: model.py:12 because:
// ERROR-SAME: try: express it with other ops, or leave it outside the exported module
func.func @unsupported(%x: !torch.vtensor<[4],f32>) -> !torch.vtensor<[2],si64> {
  %two = torch.constant.int 2
  %false = torch.constant.bool false
  %none = torch.constant.none
  %draws = torch.aten.multinomial %x, %two, %false, %none
      : !torch.vtensor<[4],f32>, !torch.int, !torch.bool, !torch.none -> !torch.vtensor<[2],si64> loc("model.py":12:0)
  return %draws : !torch.vtensor<[2],si64>
}

// -----

// So does an unknown custom op, innermost line of the call chain first.
// ERROR:      no lowering for torch.mine.op
// ERROR-SAME: at: layer.py:7
func.func @custom(%x: !torch.vtensor<[4],f32>) -> !torch.vtensor<[4],f32> {
  %y = torch.operator "torch.mine.op"(%x) : (!torch.vtensor<[4],f32>) -> !torch.vtensor<[4],f32>
      loc(callsite("<eval_with_key>.1":3:0 at callsite("layer.py":7:0 at "model.py":12:0)))
  return %y : !torch.vtensor<[4],f32>
}

// -----

// [B, T, 32] -> [B * T, 32]: upstream casts T to 1, which is refused. (The importer never makes such a view.)
// ERROR:      a dynamic size was assumed to be tensor<
// ERROR-SAME: at: model.py:14
// ERROR-SAME: because: torch-mlir lowers some reshapes and index ops as if only one dimension were dynamic
// ERROR-SAME: try: make one of the dimensions static, or reshape in two steps
func.func @guessed_size(%x: !torch.vtensor<[?,?,32],f32>) -> !torch.vtensor<[?,32],f32> attributes {torch.assume_strict_symbolic_shapes} {
  %zero = torch.constant.int 0
  %one = torch.constant.int 1
  %width = torch.constant.int 32
  %b = torch.aten.size.int %x, %zero : !torch.vtensor<[?,?,32],f32>, !torch.int -> !torch.int
  %t = torch.aten.size.int %x, %one : !torch.vtensor<[?,?,32],f32>, !torch.int -> !torch.int
  %rows = torch.aten.mul.int %b, %t : !torch.int, !torch.int -> !torch.int
  %sizes = torch.prim.ListConstruct %rows, %width : (!torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.view %x, %sizes : !torch.vtensor<[?,?,32],f32>, !torch.list<int> -> !torch.vtensor<[?,32],f32> loc("model.py":14:0)
  return %y : !torch.vtensor<[?,32],f32>
}

// -----

// One dynamic dimension is lowered rightly and not refused.
// CHECK-LABEL: func.func @one_dynamic(
// CHECK:         tensor.collapse_shape
func.func @one_dynamic(%x: !torch.vtensor<[?,4,8],f32>) -> !torch.vtensor<[?,32],f32> {
  %zero = torch.constant.int 0
  %width = torch.constant.int 32
  %b = torch.aten.size.int %x, %zero : !torch.vtensor<[?,4,8],f32>, !torch.int -> !torch.int
  %sizes = torch.prim.ListConstruct %b, %width : (!torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.view %x, %sizes : !torch.vtensor<[?,4,8],f32>, !torch.list<int> -> !torch.vtensor<[?,32],f32>
  return %y : !torch.vtensor<[?,32],f32>
}
