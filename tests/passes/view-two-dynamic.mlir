// RUN: not spikingbrain opt -p lower-torch %s 2>&1 | filecheck %s

// frontend/reshape.py exists because of this fault of torch-mlir: [B, T, 32] -> [B * T, 32] is lowered as if T were 1.
// When this test fails because no error appears any more, upstream has mended it: reshape.py, the view import in
// importer.py and this file can go.
// CHECK: a dynamic size was assumed to be tensor<?x1x32xf32>
func.func @main(%x: !torch.vtensor<[?,?,32],f32>) -> !torch.vtensor<[?,32],f32> attributes {torch.assume_strict_symbolic_shapes} {
  %zero = torch.constant.int 0
  %one = torch.constant.int 1
  %width = torch.constant.int 32
  %b = torch.aten.size.int %x, %zero : !torch.vtensor<[?,?,32],f32>, !torch.int -> !torch.int
  %t = torch.aten.size.int %x, %one : !torch.vtensor<[?,?,32],f32>, !torch.int -> !torch.int
  %rows = torch.aten.mul.int %b, %t : !torch.int, !torch.int -> !torch.int
  %sizes = torch.prim.ListConstruct %rows, %width : (!torch.int, !torch.int) -> !torch.list<int>
  %y = torch.aten.view %x, %sizes : !torch.vtensor<[?,?,32],f32>, !torch.list<int> -> !torch.vtensor<[?,32],f32>
  return %y : !torch.vtensor<[?,32],f32>
}
