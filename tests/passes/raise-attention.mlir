// RUN: spikingbrain opt -p raise-attention %s | filecheck %s
// RUN: spikingbrain opt -p raise-attention --verify-diagnostics %s

!f32_1x2x3x8 = !torch.vtensor<[1,2,3,8],f32>
!f32_1x2x5x8 = !torch.vtensor<[1,2,5,8],f32>
!f32_1x2x9x8 = !torch.vtensor<[1,2,9,8],f32>
!f32_1x2xdx8 = !torch.vtensor<[1,2,?,8],f32>
!f32_1x3x2x8 = !torch.vtensor<[1,3,2,8],f32>
!f32_1x4x2x8 = !torch.vtensor<[1,4,2,8],f32>
!f32_1x4xdx8 = !torch.vtensor<[1,4,?,8],f32>
!f32_1x5x2x8 = !torch.vtensor<[1,5,2,8],f32>
!f32_1x6x2x8 = !torch.vtensor<[1,6,2,8],f32>
!f32_1x9x2x8 = !torch.vtensor<[1,9,2,8],f32>
!f32_1xdx2x8 = !torch.vtensor<[1,?,2,8],f32>
!f32_1xdx4x8 = !torch.vtensor<[1,?,4,8],f32>
!f32_2x1x3x4 = !torch.vtensor<[2,1,3,4],f32>
!f32_2x1x4x4 = !torch.vtensor<[2,1,4,4],f32>
!i1_1x1x1x5 = !torch.vtensor<[1,1,1,5],i1>
!i1_1x1x1x9 = !torch.vtensor<[1,1,1,9],i1>
!i1_1x1x1xd = !torch.vtensor<[1,1,1,?],i1>
!i1_1x1x3x9 = !torch.vtensor<[1,1,3,9],i1>
!i1_1x1xdx5 = !torch.vtensor<[1,1,?,5],i1>
!i1_1x1xdxd = !torch.vtensor<[1,1,?,?],i1>
!i1_2x1x1x4 = !torch.vtensor<[2,1,1,4],i1>
!i1_2x1x3x4 = !torch.vtensor<[2,1,3,4],i1>
!i1_3x4 = !torch.vtensor<[3,4],i1>
!i1_4 = !torch.vtensor<[4],i1>
!si64_1x1x1x5 = !torch.vtensor<[1,1,1,5],si64>
!si64_1x1x1x9 = !torch.vtensor<[1,1,1,9],si64>
!si64_1x1x1xd = !torch.vtensor<[1,1,1,?],si64>
!si64_1x1x3 = !torch.vtensor<[1,1,3],si64>
!si64_1x1x3x1 = !torch.vtensor<[1,1,3,1],si64>
!si64_1x1x5 = !torch.vtensor<[1,1,5],si64>
!si64_1x1x9 = !torch.vtensor<[1,1,9],si64>
!si64_1x1xd = !torch.vtensor<[1,1,?],si64>
!si64_1x1xdx1 = !torch.vtensor<[1,1,?,1],si64>
!si64_1x3 = !torch.vtensor<[1,3],si64>
!si64_1x5 = !torch.vtensor<[1,5],si64>
!si64_1x6 = !torch.vtensor<[1,6],si64>
!si64_1x9 = !torch.vtensor<[1,9],si64>
!si64_1xd = !torch.vtensor<[1,?],si64>
!si64_2x1 = !torch.vtensor<[2,1],si64>
!si64_2x1x1 = !torch.vtensor<[2,1,1],si64>
!si64_2x1x1x1 = !torch.vtensor<[2,1,1,1],si64>
!si64_2x1x1x4 = !torch.vtensor<[2,1,1,4],si64>
!si64_2x1x3 = !torch.vtensor<[2,1,3],si64>
!si64_2x1x3x1 = !torch.vtensor<[2,1,3,1],si64>
!si64_2x1x4 = !torch.vtensor<[2,1,4],si64>
!si64_2x3 = !torch.vtensor<[2,3],si64>
!si64_2x4 = !torch.vtensor<[2,4],si64>
!si64_3 = !torch.vtensor<[3],si64>
!si64_3x1 = !torch.vtensor<[3,1],si64>
!si64_4 = !torch.vtensor<[4],si64>
!q = !torch.vtensor<[2,2,3,4],f32>
!one = !torch.vtensor<[2,1,3,4],f32>
!wide = !torch.vtensor<[2,2,3,8],f32>
!any = !torch.vtensor<[2,?,3,4],f32>
!half = !torch.vtensor<[2,2,3,4],f16>
!double = !torch.vtensor<[2,2,3,4],f64>
!mask = !torch.vtensor<[2,1,3,3],i1>

// The model's own transposes to [B, H, T, D] and back disappear. Grouped heads, a given scale, a dynamic length.
// CHECK-LABEL: func.func @own_transposes(
// CHECK-SAME:      %[[Q:[a-z0-9]+]]: !torch.vtensor<[1,?,4,8],f32>, %[[K:[a-z0-9]+]]: !torch.vtensor<[1,5,2,8],f32>, %[[V:[a-z0-9]+]]: {{.+}}, %[[I:[a-z0-9]+]]: {{.+}}, %[[J:[a-z0-9]+]]: {{.+}}) ->
func.func @own_transposes(%q: !f32_1xdx4x8, %k: !f32_1x5x2x8, %v: !f32_1x5x2x8, %i: !si64_1xd, %j: !si64_1x5) -> !f32_1xdx4x8 {
  %int1 = torch.constant.int 1
  %0 = torch.aten.unsqueeze %i, %int1 : !si64_1xd, !torch.int -> !si64_1x1xd
  %int3 = torch.constant.int 3
  %1 = torch.aten.unsqueeze %0, %int3 : !si64_1x1xd, !torch.int -> !si64_1x1xdx1
  %2 = torch.aten.unsqueeze %j, %int1 : !si64_1x5, !torch.int -> !si64_1x1x5
  %int2 = torch.constant.int 2
  %3 = torch.aten.unsqueeze %2, %int2 : !si64_1x1x5, !torch.int -> !si64_1x1x1x5
  %int0 = torch.constant.int 0
  %4 = torch.prim.ListConstruct %int0, %int2, %int1, %int3 : (!torch.int, !torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %5 = torch.aten.permute %q, %4 : !f32_1xdx4x8, !torch.list<int> -> !f32_1x4xdx8
  %6 = torch.aten.permute %k, %4 : !f32_1x5x2x8, !torch.list<int> -> !f32_1x2x5x8
  %7 = torch.aten.permute %v, %4 : !f32_1x5x2x8, !torch.list<int> -> !f32_1x2x5x8
  %8 = torch.aten.ge.Scalar %3, %int0 : !si64_1x1x1x5, !torch.int -> !i1_1x1x1x5
  %9 = torch.aten.le.Tensor %3, %1 : !si64_1x1x1x5, !si64_1x1xdx1 -> !i1_1x1xdx5
  %10 = torch.aten.bitwise_and.Tensor %8, %9 : !i1_1x1x1x5, !i1_1x1xdx5 -> !i1_1x1xdx5
  %float0.000000e00 = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %float2.500000e-01 = torch.constant.float 2.500000e-01
  %true = torch.constant.bool true
  // CHECK-DAG:     %[[Q1:.+]] = torch_c.to_builtin_tensor %[[Q]] :
  // CHECK-DAG:     %[[K1:.+]] = torch_c.to_builtin_tensor %[[K]] :
  // CHECK-DAG:     %[[V1:.+]] = torch_c.to_builtin_tensor %[[V]] :
  // CHECK-DAG:     %[[I1:.+]] = torch_c.to_builtin_tensor %[[I]] :
  // CHECK-DAG:     %[[J1:.+]] = torch_c.to_builtin_tensor %[[J]] :
  // CHECK:         %[[O:.+]] = "spikingbrain.attention"(%[[Q1]], %[[I1]], %[[K1]], %[[V1]], %[[J1]])
  // CHECK-SAME:      {operandSegmentSizes = array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>, scale = 2.500000e-01 : f64, sinks = 0 : i64, window = 0 : i64}
  // CHECK-NEXT:    %[[R:.+]] = torch_c.from_builtin_tensor %[[O]] : tensor<1x?x4x8xf32>
  // CHECK:         return %[[R]]
  %11 = torch.aten.scaled_dot_product_attention %5, %6, %7, %10, %float0.000000e00, %false, %float2.500000e-01, %true : !f32_1x4xdx8, !f32_1x2x5x8, !f32_1x2x5x8, !i1_1x1xdx5, !torch.float, !torch.bool, !torch.float, !torch.bool -> !f32_1x4xdx8
  %12 = torch.aten.permute %11, %4 : !f32_1x4xdx8, !torch.list<int> -> !f32_1xdx4x8
  return %12 : !f32_1xdx4x8
}

// A model that keeps [B, H, T, D] gets the transposes; the scale is 1 / sqrt(D). A window with sinks.
// CHECK-LABEL: func.func @heads_first(
func.func @heads_first(%q: !f32_2x1x3x4, %k: !f32_2x1x4x4, %v: !f32_2x1x4x4, %i: !si64_2x3, %j: !si64_2x4) -> !f32_2x1x3x4 {
  %int1 = torch.constant.int 1
  %0 = torch.aten.unsqueeze %i, %int1 : !si64_2x3, !torch.int -> !si64_2x1x3
  %int3 = torch.constant.int 3
  %1 = torch.aten.unsqueeze %0, %int3 : !si64_2x1x3, !torch.int -> !si64_2x1x3x1
  %2 = torch.aten.unsqueeze %j, %int1 : !si64_2x4, !torch.int -> !si64_2x1x4
  %int2 = torch.constant.int 2
  %3 = torch.aten.unsqueeze %2, %int2 : !si64_2x1x4, !torch.int -> !si64_2x1x1x4
  %4 = torch.aten.lt.Scalar %3, %int2 : !si64_2x1x1x4, !torch.int -> !i1_2x1x1x4
  %int8 = torch.constant.int 8
  %5 = torch.aten.sub.Scalar %1, %int8, %int1 : !si64_2x1x3x1, !torch.int, !torch.int -> !si64_2x1x3x1
  %6 = torch.aten.lt.Tensor %5, %3 : !si64_2x1x3x1, !si64_2x1x1x4 -> !i1_2x1x3x4
  %7 = torch.aten.bitwise_or.Tensor %4, %6 : !i1_2x1x1x4, !i1_2x1x3x4 -> !i1_2x1x3x4
  %8 = torch.aten.ge.Tensor %1, %3 : !si64_2x1x3x1, !si64_2x1x1x4 -> !i1_2x1x3x4
  %int-1 = torch.constant.int -1
  %9 = torch.aten.gt.Scalar %3, %int-1 : !si64_2x1x1x4, !torch.int -> !i1_2x1x1x4
  %10 = torch.aten.bitwise_and.Tensor %8, %9 : !i1_2x1x3x4, !i1_2x1x1x4 -> !i1_2x1x3x4
  %11 = torch.aten.bitwise_and.Tensor %7, %10 : !i1_2x1x3x4, !i1_2x1x3x4 -> !i1_2x1x3x4
  %float0.000000e00 = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  // CHECK-COUNT-3: torch.aten.permute
  // CHECK:         "spikingbrain.attention"{{.*}}scale = 5.000000e-01 : f64, sinks = 2 : i64, window = 8 : i64
  // CHECK:         torch.aten.permute
  %12 = torch.aten.scaled_dot_product_attention %q, %k, %v, %11, %float0.000000e00, %false, %none, %false : !f32_2x1x3x4, !f32_2x1x4x4, !f32_2x1x4x4, !i1_2x1x3x4, !torch.float, !torch.bool, !torch.none, !torch.bool -> !f32_2x1x3x4
  return %12 : !f32_2x1x3x4
}

// Keys, values and positions concatenated alike, cache first, become the two segments of the op.
// CHECK-LABEL: func.func @cache_and_new(
// CHECK-SAME:      %[[KC:[a-z0-9]+]]: !torch.vtensor<[1,6,2,8],f32>, %[[VC:[a-z0-9]+]]: !torch.vtensor<[1,6,2,8],f32>, %[[JC:[a-z0-9]+]]: !torch.vtensor<[1,6],si64>
func.func @cache_and_new(%q: !f32_1xdx2x8, %k: !f32_1xdx2x8, %v: !f32_1xdx2x8, %i: !si64_1xd, %j: !si64_1xd, %kc: !f32_1x6x2x8, %vc: !f32_1x6x2x8, %jc: !si64_1x6) -> !f32_1xdx2x8 {
  %0 = torch.prim.ListConstruct %jc, %j : (!si64_1x6, !si64_1xd) -> !torch.list<vtensor>
  %int1 = torch.constant.int 1
  %1 = torch.aten.cat %0, %int1 : !torch.list<vtensor>, !torch.int -> !si64_1xd
  %2 = torch.aten.unsqueeze %i, %int1 : !si64_1xd, !torch.int -> !si64_1x1xd
  %int3 = torch.constant.int 3
  %3 = torch.aten.unsqueeze %2, %int3 : !si64_1x1xd, !torch.int -> !si64_1x1xdx1
  %4 = torch.aten.unsqueeze %1, %int1 : !si64_1xd, !torch.int -> !si64_1x1xd
  %int2 = torch.constant.int 2
  %5 = torch.aten.unsqueeze %4, %int2 : !si64_1x1xd, !torch.int -> !si64_1x1x1xd
  %int0 = torch.constant.int 0
  %6 = torch.prim.ListConstruct %int0, %int2, %int1, %int3 : (!torch.int, !torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %7 = torch.aten.permute %q, %6 : !f32_1xdx2x8, !torch.list<int> -> !f32_1x2xdx8
  %8 = torch.prim.ListConstruct %kc, %k : (!f32_1x6x2x8, !f32_1xdx2x8) -> !torch.list<vtensor>
  %9 = torch.aten.cat %8, %int1 : !torch.list<vtensor>, !torch.int -> !f32_1xdx2x8
  %10 = torch.aten.permute %9, %6 : !f32_1xdx2x8, !torch.list<int> -> !f32_1x2xdx8
  %11 = torch.prim.ListConstruct %vc, %v : (!f32_1x6x2x8, !f32_1xdx2x8) -> !torch.list<vtensor>
  %12 = torch.aten.cat %11, %int1 : !torch.list<vtensor>, !torch.int -> !f32_1xdx2x8
  %13 = torch.aten.permute %12, %6 : !f32_1xdx2x8, !torch.list<int> -> !f32_1x2xdx8
  %14 = torch.aten.ge.Scalar %5, %int0 : !si64_1x1x1xd, !torch.int -> !i1_1x1x1xd
  %15 = torch.aten.le.Tensor %5, %3 : !si64_1x1x1xd, !si64_1x1xdx1 -> !i1_1x1xdxd
  %16 = torch.aten.bitwise_and.Tensor %14, %15 : !i1_1x1x1xd, !i1_1x1xdxd -> !i1_1x1xdxd
  %float0.000000e00 = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  // CHECK-DAG:     %[[KC1:.+]] = torch_c.to_builtin_tensor %[[KC]] :
  // CHECK-DAG:     %[[VC1:.+]] = torch_c.to_builtin_tensor %[[VC]] :
  // CHECK-DAG:     %[[JC1:.+]] = torch_c.to_builtin_tensor %[[JC]] :
  // CHECK:         "spikingbrain.attention"({{.*}}, %[[KC1]], %[[VC1]], %[[JC1]])
  // CHECK-SAME:      array<i32: 1, 1, 1, 1, 1, 1, 1, 1, 0, 0>
  %17 = torch.aten.scaled_dot_product_attention %7, %10, %13, %16, %float0.000000e00, %false, %none, %false : !f32_1x2xdx8, !f32_1x2xdx8, !f32_1x2xdx8, !i1_1x1xdxd, !torch.float, !torch.bool, !torch.none, !torch.bool -> !f32_1x2xdx8
  %18 = torch.aten.permute %17, %6 : !f32_1x2xdx8, !torch.list<int> -> !f32_1xdx2x8
  return %18 : !f32_1xdx2x8
}

// The values are cut at another place than the keys: one segment, the concatenations stay.
// CHECK-LABEL: func.func @cut_elsewhere(
func.func @cut_elsewhere(%q: !f32_1x3x2x8, %k: !f32_1x3x2x8, %v: !f32_1x4x2x8, %i: !si64_1x3, %j: !si64_1x3, %kc: !f32_1x6x2x8, %vc: !f32_1x5x2x8, %jc: !si64_1x6) -> !f32_1x3x2x8 {
  %0 = torch.prim.ListConstruct %jc, %j : (!si64_1x6, !si64_1x3) -> !torch.list<vtensor>
  %int1 = torch.constant.int 1
  %1 = torch.aten.cat %0, %int1 : !torch.list<vtensor>, !torch.int -> !si64_1x9
  %2 = torch.aten.unsqueeze %i, %int1 : !si64_1x3, !torch.int -> !si64_1x1x3
  %int3 = torch.constant.int 3
  %3 = torch.aten.unsqueeze %2, %int3 : !si64_1x1x3, !torch.int -> !si64_1x1x3x1
  %4 = torch.aten.unsqueeze %1, %int1 : !si64_1x9, !torch.int -> !si64_1x1x9
  %int2 = torch.constant.int 2
  %5 = torch.aten.unsqueeze %4, %int2 : !si64_1x1x9, !torch.int -> !si64_1x1x1x9
  %int0 = torch.constant.int 0
  %6 = torch.prim.ListConstruct %int0, %int2, %int1, %int3 : (!torch.int, !torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %7 = torch.aten.permute %q, %6 : !f32_1x3x2x8, !torch.list<int> -> !f32_1x2x3x8
  %8 = torch.prim.ListConstruct %kc, %k : (!f32_1x6x2x8, !f32_1x3x2x8) -> !torch.list<vtensor>
  %9 = torch.aten.cat %8, %int1 : !torch.list<vtensor>, !torch.int -> !f32_1x9x2x8
  %10 = torch.aten.permute %9, %6 : !f32_1x9x2x8, !torch.list<int> -> !f32_1x2x9x8
  %11 = torch.prim.ListConstruct %vc, %v : (!f32_1x5x2x8, !f32_1x4x2x8) -> !torch.list<vtensor>
  %12 = torch.aten.cat %11, %int1 : !torch.list<vtensor>, !torch.int -> !f32_1x9x2x8
  %13 = torch.aten.permute %12, %6 : !f32_1x9x2x8, !torch.list<int> -> !f32_1x2x9x8
  %14 = torch.aten.ge.Scalar %5, %int0 : !si64_1x1x1x9, !torch.int -> !i1_1x1x1x9
  %15 = torch.aten.le.Tensor %5, %3 : !si64_1x1x1x9, !si64_1x1x3x1 -> !i1_1x1x3x9
  %16 = torch.aten.bitwise_and.Tensor %14, %15 : !i1_1x1x1x9, !i1_1x1x3x9 -> !i1_1x1x3x9
  %float0.000000e00 = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  // CHECK-COUNT-3: torch.aten.cat
  // CHECK:         "spikingbrain.attention"{{.*}}array<i32: 1, 1, 1, 1, 1, 0, 0, 0, 0, 0>
  %17 = torch.aten.scaled_dot_product_attention %7, %10, %13, %16, %float0.000000e00, %false, %none, %false : !f32_1x2x3x8, !f32_1x2x9x8, !f32_1x2x9x8, !i1_1x1x3x9, !torch.float, !torch.bool, !torch.none, !torch.bool -> !f32_1x2x3x8
  %18 = torch.aten.permute %17, %6 : !f32_1x2x3x8, !torch.list<int> -> !f32_1x3x2x8
  return %18 : !f32_1x3x2x8
}

// Keys before the window instead of in it. (All spellings and lookalikes of masks: tests/unit/test_visibility.py.)
// CHECK-LABEL: func.func @window_on_the_wrong_side(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @window_on_the_wrong_side(%q: !f32_2x1x3x4, %k: !f32_2x1x4x4, %v: !f32_2x1x4x4, %i: !si64_2x3, %j: !si64_2x4) -> !f32_2x1x3x4 {
  %int1 = torch.constant.int 1
  %0 = torch.aten.unsqueeze %i, %int1 : !si64_2x3, !torch.int -> !si64_2x1x3
  %int3 = torch.constant.int 3
  %1 = torch.aten.unsqueeze %0, %int3 : !si64_2x1x3, !torch.int -> !si64_2x1x3x1
  %2 = torch.aten.unsqueeze %j, %int1 : !si64_2x4, !torch.int -> !si64_2x1x4
  %int2 = torch.constant.int 2
  %3 = torch.aten.unsqueeze %2, %int2 : !si64_2x1x4, !torch.int -> !si64_2x1x1x4
  %int0 = torch.constant.int 0
  %4 = torch.aten.ge.Scalar %3, %int0 : !si64_2x1x1x4, !torch.int -> !i1_2x1x1x4
  %5 = torch.aten.le.Tensor %3, %1 : !si64_2x1x1x4, !si64_2x1x3x1 -> !i1_2x1x3x4
  %6 = torch.aten.bitwise_and.Tensor %4, %5 : !i1_2x1x1x4, !i1_2x1x3x4 -> !i1_2x1x3x4
  %int8 = torch.constant.int 8
  %7 = torch.aten.sub.Scalar %1, %int8, %int1 : !si64_2x1x3x1, !torch.int, !torch.int -> !si64_2x1x3x1
  %8 = torch.aten.lt.Tensor %3, %7 : !si64_2x1x1x4, !si64_2x1x3x1 -> !i1_2x1x3x4
  %9 = torch.aten.bitwise_and.Tensor %6, %8 : !i1_2x1x3x4, !i1_2x1x3x4 -> !i1_2x1x3x4
  %float0.000000e00 = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  // expected-remark@+1 {{raise-attention: the mask holds a condition of another form: key - query <= -9}}
  %10 = torch.aten.scaled_dot_product_attention %q, %k, %v, %9, %float0.000000e00, %false, %none, %false : !f32_2x1x3x4, !f32_2x1x4x4, !f32_2x1x4x4, !i1_2x1x3x4, !torch.float, !torch.bool, !torch.none, !torch.bool -> !f32_2x1x3x4
  return %10 : !f32_2x1x3x4
}

// Without a lower bound an empty slot, of position -1, would be seen.
// CHECK-LABEL: func.func @empty_slots_visible(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @empty_slots_visible(%q: !f32_2x1x3x4, %k: !f32_2x1x4x4, %v: !f32_2x1x4x4, %i: !si64_2x3, %j: !si64_2x4) -> !f32_2x1x3x4 {
  %int1 = torch.constant.int 1
  %0 = torch.aten.unsqueeze %i, %int1 : !si64_2x3, !torch.int -> !si64_2x1x3
  %int3 = torch.constant.int 3
  %1 = torch.aten.unsqueeze %0, %int3 : !si64_2x1x3, !torch.int -> !si64_2x1x3x1
  %2 = torch.aten.unsqueeze %j, %int1 : !si64_2x4, !torch.int -> !si64_2x1x4
  %int2 = torch.constant.int 2
  %3 = torch.aten.unsqueeze %2, %int2 : !si64_2x1x4, !torch.int -> !si64_2x1x1x4
  %4 = torch.aten.le.Tensor %3, %1 : !si64_2x1x1x4, !si64_2x1x3x1 -> !i1_2x1x3x4
  %float0.000000e00 = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  // expected-remark@+1 {{raise-attention: the mask does not exclude negative key positions (empty cache slots): add key >= 0}}
  %5 = torch.aten.scaled_dot_product_attention %q, %k, %v, %4, %float0.000000e00, %false, %none, %false : !f32_2x1x3x4, !f32_2x1x4x4, !f32_2x1x4x4, !i1_2x1x3x4, !torch.float, !torch.bool, !torch.none, !torch.bool -> !f32_2x1x3x4
  return %5 : !f32_2x1x3x4
}

// One query position stands for three queries by broadcasting.
// CHECK-LABEL: func.func @one_position_for_all_queries(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @one_position_for_all_queries(%q: !f32_2x1x3x4, %k: !f32_2x1x4x4, %v: !f32_2x1x4x4, %i: !si64_2x1, %j: !si64_2x4) -> !f32_2x1x3x4 {
  %int1 = torch.constant.int 1
  %0 = torch.aten.unsqueeze %i, %int1 : !si64_2x1, !torch.int -> !si64_2x1x1
  %int3 = torch.constant.int 3
  %1 = torch.aten.unsqueeze %0, %int3 : !si64_2x1x1, !torch.int -> !si64_2x1x1x1
  %2 = torch.aten.unsqueeze %j, %int1 : !si64_2x4, !torch.int -> !si64_2x1x4
  %int2 = torch.constant.int 2
  %3 = torch.aten.unsqueeze %2, %int2 : !si64_2x1x4, !torch.int -> !si64_2x1x1x4
  %int0 = torch.constant.int 0
  %4 = torch.aten.ge.Scalar %3, %int0 : !si64_2x1x1x4, !torch.int -> !i1_2x1x1x4
  %5 = torch.aten.le.Tensor %3, %1 : !si64_2x1x1x4, !si64_2x1x1x1 -> !i1_2x1x1x4
  %6 = torch.aten.bitwise_and.Tensor %4, %5 : !i1_2x1x1x4, !i1_2x1x1x4 -> !i1_2x1x1x4
  %float0.000000e00 = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  // expected-remark@+1 {{raise-attention: sizes of positions, keys and values differ: broadcasting is not raised}}
  %7 = torch.aten.scaled_dot_product_attention %q, %k, %v, %6, %float0.000000e00, %false, %none, %false : !f32_2x1x3x4, !f32_2x1x4x4, !f32_2x1x4x4, !i1_2x1x1x4, !torch.float, !torch.bool, !torch.none, !torch.bool -> !f32_2x1x3x4
  return %7 : !f32_2x1x3x4
}

// Positions of all batches at once: the op wants one row for each.
// CHECK-LABEL: func.func @rank_2(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @rank_2(%q: !f32_2x1x3x4, %k: !f32_2x1x4x4, %v: !f32_2x1x4x4, %i: !si64_3, %j: !si64_4) -> !f32_2x1x3x4 {
  %int0 = torch.constant.int 0
  %0 = torch.aten.ge.Scalar %j, %int0 : !si64_4, !torch.int -> !i1_4
  %int1 = torch.constant.int 1
  %1 = torch.aten.unsqueeze %i, %int1 : !si64_3, !torch.int -> !si64_3x1
  %2 = torch.aten.le.Tensor %j, %1 : !si64_4, !si64_3x1 -> !i1_3x4
  %3 = torch.aten.bitwise_and.Tensor %0, %2 : !i1_4, !i1_3x4 -> !i1_3x4
  %float0.000000e00 = torch.constant.float 0.000000e+00
  %false = torch.constant.bool false
  %none = torch.constant.none
  // expected-remark@+1 {{raise-attention: positions without a batch dimension}}
  %4 = torch.aten.scaled_dot_product_attention %q, %k, %v, %3, %float0.000000e00, %false, %none, %false : !f32_2x1x3x4, !f32_2x1x4x4, !f32_2x1x4x4, !i1_3x4, !torch.float, !torch.bool, !torch.none, !torch.bool -> !f32_2x1x3x4
  return %4 : !f32_2x1x3x4
}

// A mask that the caller gives.
// CHECK-LABEL: func.func @mask_from_outside(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @mask_from_outside(%q: !q, %k: !q, %v: !q, %mask: !mask) -> !q {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %zero = torch.constant.float 0.000000e+00
  // expected-remark@+1 {{raise-attention: the mask is an input of the model}}
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, %zero, %false, %none, %false
      : !q, !q, !q, !mask, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// No mask at all.
// CHECK-LABEL: func.func @no_mask(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @no_mask(%q: !q, %k: !q, %v: !q) -> !q {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %zero = torch.constant.float 0.000000e+00
  // expected-remark@+1 {{raise-attention: no mask: attention over all keys}}
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %none, %zero, %false, %none, %false
      : !q, !q, !q, !torch.none, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// is_causal numbers queries and keys from 0.
// CHECK-LABEL: func.func @is_causal(
// CHECK:         %[[I:.+]] = linalg.generic {{.*}} outs({{.*}} : tensor<2x3xi64>)
// CHECK:         "spikingbrain.attention"({{.*}}, %[[I]], {{.*}}sinks = 0 : i64, window = 0 : i64}
func.func @is_causal(%q: !q, %k: !q, %v: !q) -> !q {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %true = torch.constant.bool true
  %zero = torch.constant.float 0.000000e+00
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %none, %zero, %true, %none, %false
      : !q, !q, !q, !torch.none, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// Keys and values stay halves; the query becomes f32, and the result f16 again.
// CHECK-LABEL: func.func @halves(
// CHECK:         torch.aten.to.dtype %{{.*}} -> !torch.vtensor<[2,3,2,4],f32>
// CHECK:         "spikingbrain.attention"{{.*}} : (tensor<2x3x2x4xf32>, tensor<2x3xi64>, tensor<2x3x2x4xf16>, tensor<2x3x2x4xf16>, tensor<2x3xi64>) -> tensor<2x3x2x4xf32>
// CHECK:         torch.aten.to.dtype %{{.*}} -> !torch.vtensor<[2,3,2,4],f16>
func.func @halves(%q: !half, %k: !half, %v: !half) -> !half {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %true = torch.constant.bool true
  %zero = torch.constant.float 0.000000e+00
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %none, %zero, %true, %none, %false
      : !half, !half, !half, !torch.none, !torch.float, !torch.bool, !torch.none, !torch.bool -> !half
  return %o : !half
}

// A cache of f16 keys and of values in codes with a scale per slot and head, both made f32 to be concatenated with new
// ones: they are read as they lie.
// CHECK-LABEL: func.func @narrow_cache(
// CHECK:         array<i32: 1, 1, 1, 1, 1, 1, 1, 1, 0, 1>
// CHECK-SAME:    tensor<1x6x2x8xf16>, tensor<1x6x2x8xi8>, tensor<1x6xi64>, tensor<1x6x2xf32>) -> tensor<1x3x2x8xf32>
func.func @narrow_cache(%q: !f32_1x3x2x8, %k: !f32_1x3x2x8, %v: !f32_1x3x2x8, %i: !si64_1x3, %kc: !torch.vtensor<[1,6,2,8],f16>, %vc: !torch.vtensor<[1,6,2,8],si8>, %scales: !torch.vtensor<[1,6,2],f32>, %jc: !si64_1x6) -> !f32_1x3x2x8 {
  %int0 = torch.constant.int 0
  %int1 = torch.constant.int 1
  %int2 = torch.constant.int 2
  %int3 = torch.constant.int 3
  %int6 = torch.constant.int 6
  %minus = torch.constant.int -1
  %false = torch.constant.bool false
  %none = torch.constant.none
  %zero = torch.constant.float 0.000000e+00
  %0 = torch.prim.ListConstruct %jc, %i : (!si64_1x6, !si64_1x3) -> !torch.list<vtensor>
  %1 = torch.aten.cat %0, %int1 : !torch.list<vtensor>, !torch.int -> !si64_1x9
  %2 = torch.aten.unsqueeze %i, %int1 : !si64_1x3, !torch.int -> !si64_1x1x3
  %3 = torch.aten.unsqueeze %2, %int3 : !si64_1x1x3, !torch.int -> !si64_1x1x3x1
  %4 = torch.aten.unsqueeze %1, %int1 : !si64_1x9, !torch.int -> !si64_1x1x9
  %5 = torch.aten.unsqueeze %4, %int2 : !si64_1x1x9, !torch.int -> !si64_1x1x1x9
  %6 = torch.prim.ListConstruct %int0, %int2, %int1, %int3 : (!torch.int, !torch.int, !torch.int, !torch.int) -> !torch.list<int>
  %7 = torch.aten.permute %q, %6 : !f32_1x3x2x8, !torch.list<int> -> !torch.vtensor<[1,2,3,8],f32>
  %8 = torch.aten.to.dtype %kc, %int6, %false, %false, %none : !torch.vtensor<[1,6,2,8],f16>, !torch.int, !torch.bool, !torch.bool, !torch.none -> !f32_1x6x2x8
  %9 = torch.prim.ListConstruct %8, %k : (!f32_1x6x2x8, !f32_1x3x2x8) -> !torch.list<vtensor>
  %10 = torch.aten.cat %9, %int1 : !torch.list<vtensor>, !torch.int -> !f32_1x9x2x8
  %11 = torch.aten.permute %10, %6 : !f32_1x9x2x8, !torch.list<int> -> !f32_1x2x9x8
  %12 = torch.prims.convert_element_type %vc, %int6 : !torch.vtensor<[1,6,2,8],si8>, !torch.int -> !f32_1x6x2x8
  %13 = torch.aten.unsqueeze %scales, %minus : !torch.vtensor<[1,6,2],f32>, !torch.int -> !torch.vtensor<[1,6,2,1],f32>
  %14 = torch.aten.mul.Tensor %12, %13 : !f32_1x6x2x8, !torch.vtensor<[1,6,2,1],f32> -> !f32_1x6x2x8
  %15 = torch.prim.ListConstruct %14, %v : (!f32_1x6x2x8, !f32_1x3x2x8) -> !torch.list<vtensor>
  %16 = torch.aten.cat %15, %int1 : !torch.list<vtensor>, !torch.int -> !f32_1x9x2x8
  %17 = torch.aten.permute %16, %6 : !f32_1x9x2x8, !torch.list<int> -> !f32_1x2x9x8
  %18 = torch.aten.ge.Scalar %5, %int0 : !si64_1x1x1x9, !torch.int -> !i1_1x1x1x9
  %19 = torch.aten.le.Tensor %5, %3 : !si64_1x1x1x9, !si64_1x1x3x1 -> !i1_1x1x3x9
  %20 = torch.aten.bitwise_and.Tensor %18, %19 : !i1_1x1x1x9, !i1_1x1x3x9 -> !i1_1x1x3x9
  %21 = torch.aten.scaled_dot_product_attention %7, %11, %17, %20, %zero, %false, %none, %false : !torch.vtensor<[1,2,3,8],f32>, !f32_1x2x9x8, !f32_1x2x9x8, !i1_1x1x3x9, !torch.float, !torch.bool, !torch.none, !torch.bool -> !torch.vtensor<[1,2,3,8],f32>
  %22 = torch.aten.permute %21, %6 : !torch.vtensor<[1,2,3,8],f32>, !torch.list<int> -> !f32_1x3x2x8
  return %22 : !f32_1x3x2x8
}

// Dropout: no op of ours draws random numbers.
// CHECK-LABEL: func.func @dropout(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @dropout(%q: !q, %k: !q, %v: !q, %mask: !mask) -> !q {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %half = torch.constant.float 5.000000e-01
  // expected-remark@+1 {{raise-attention: dropout, or is_causal is not constant}}
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, %half, %false, %none, %false
      : !q, !q, !q, !mask, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// A scale that the caller gives.
// CHECK-LABEL: func.func @unknown_scale(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @unknown_scale(%q: !q, %k: !q, %v: !q, %mask: !mask, %scale: !torch.float) -> !q {
  %false = torch.constant.bool false
  %zero = torch.constant.float 0.000000e+00
  // expected-remark@+1 {{raise-attention: the scale is not constant}}
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, %zero, %false, %scale, %false
      : !q, !q, !q, !mask, !torch.float, !torch.bool, !torch.float, !torch.bool -> !q
  return %o : !q
}

// f64: the arithmetic is that of f32.
// CHECK-LABEL: func.func @double_precision(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @double_precision(%q: !double, %k: !double, %v: !double, %mask: !mask) -> !double {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %zero = torch.constant.float 0.000000e+00
  // expected-remark@+1 {{raise-attention: element type f64; f16, f32, bf16 are raised}}
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, %zero, %false, %none, %false
      : !double, !double, !double, !mask, !torch.float, !torch.bool, !torch.none, !torch.bool -> !double
  return %o : !double
}

// Values of another width than keys.
// CHECK-LABEL: func.func @value_width(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @value_width(%q: !q, %k: !q, %v: !wide, %mask: !mask) -> !wide {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %zero = torch.constant.float 0.000000e+00
  // expected-remark@+1 {{raise-attention: heads of keys and values differ, or head sizes differ}}
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, %zero, %false, %none, %false
      : !q, !q, !wide, !mask, !torch.float, !torch.bool, !torch.none, !torch.bool -> !wide
  return %o : !wide
}

// Heads that torch broadcasts without enable_gqa.
// CHECK-LABEL: func.func @one_key_head(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @one_key_head(%q: !q, %k: !one, %v: !one, %mask: !mask) -> !q {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %zero = torch.constant.float 0.000000e+00
  // expected-remark@+1 {{raise-attention: grouped heads without enable_gqa}}
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, %zero, %false, %none, %false
      : !q, !one, !one, !mask, !torch.float, !torch.bool, !torch.none, !torch.bool -> !q
  return %o : !q
}

// A number of heads that is not known.
// CHECK-LABEL: func.func @dynamic_heads(
// CHECK-NOT:     spikingbrain.attention
// CHECK:         torch.aten.scaled_dot_product_attention
func.func @dynamic_heads(%q: !any, %k: !any, %v: !any, %mask: !mask) -> !any {
  %none = torch.constant.none
  %false = torch.constant.bool false
  %zero = torch.constant.float 0.000000e+00
  // expected-remark@+1 {{raise-attention: query, key and value must be [B, H, T, D] with known heads and head size}}
  %o = torch.aten.scaled_dot_product_attention %q, %k, %v, %mask, %zero, %false, %none, %false
      : !any, !any, !any, !mask, !torch.float, !torch.bool, !torch.none, !torch.bool -> !any
  return %o : !any
}
