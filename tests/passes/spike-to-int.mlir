// RUN: spikingbrain opt -p spike-to-int --target riscv64 %s | filecheck %s
// RUN: spikingbrain opt -p spike-to-int --clean --target x86-64-v3 %s | filecheck %s --check-prefix=WORDS
// RUN: spikingbrain opt -p spike-to-int --clean --target maca %s | filecheck %s --check-prefix=WAVES

// Without vector kernels: products of counts and codes in i32, sums of them in i64, floats only outside.
// CHECK-LABEL: func.func @portable(
// CHECK:         linalg.generic {{.*}}["parallel", "reduction"]
// CHECK:           math.absf
// CHECK:           arith.extf %{{.+}} : f32 to f64
// CHECK:         arith.maximumf
// CHECK:         arith.minimumf
// CHECK:         arith.divf
// CHECK:         math.roundeven
// CHECK:         arith.fptosi %{{.+}} : f32 to i32
// CHECK:         linalg.generic {{.*}}["parallel", "parallel", "parallel", "reduction"]
// CHECK:           arith.extsi %{{.+}} : i8 to i32
// CHECK:           arith.muli
// CHECK:           arith.extsi %{{.+}} : i32 to i64
// CHECK:           arith.addi
// CHECK-NOT:     spike
// CHECK:         return
func.func @portable(%x: tensor<1x?x64xf32>, %w: tensor<40x64xi8>, %scale: tensor<40x2xf32>) -> tensor<1x?x40xf32> {
  %counts, %threshold = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}
      : (tensor<1x?x64xf32>) -> (tensor<1x?x64xf32>, tensor<1x?xf32>)
  %y = "spikingbrain.spike_linear"(%counts, %threshold, %w, %scale) {bits = 8 : i64}
      : (tensor<1x?x64xf32>, tensor<1x?xf32>, tensor<40x64xi8>, tensor<40x2xf32>) -> tensor<1x?x40xf32>
  return %y : tensor<1x?x40xf32>
}

// A vector is a row on its own; counts and threshold may be asked for too.
// CHECK-LABEL: func.func @vector(
// CHECK:         %[[V:.+]] = tensor.collapse_shape %{{.+}} [] : tensor<1xf32> into tensor<f32>
// CHECK:         return %{{.+}}, %[[V]]
func.func @vector(%x: tensor<8xf32>) -> (tensor<8xf32>, tensor<f32>) {
  %counts, %threshold = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}
      : (tensor<8xf32>) -> (tensor<8xf32>, tensor<f32>)
  return %counts, %threshold : tensor<8xf32>, tensor<f32>
}

// Two projections of one input, stored: packed for the dot products of the target, 8 lanes of 2 words here, and an encoder
// for each size of groups; the threshold is asked for too.
// WORDS-DAG:     func.func private @[[I8:spike_linear_i8_k64_g1_n40_m_bias]](
// WORDS-DAG:     func.func private @[[I4:spike_linear_i4_k64_g2_n20_m]](
// WORDS-LABEL: func.func @stored(
// WORDS-SAME:      %[[X:[a-z0-9]+]]: tensor<1x?x64xf32>
// WORDS:         %[[ROWS:.+]] = tensor.collapse_shape %[[X]] {{\[\[}}0, 1], [2]]
// WORDS:         %[[C:[0-9]+]]:5 = "spikingbrain_control.launch"({{.*}}%[[ROWS]]{{.*}}callee = @spike_encode_k64_g1_8_2_
// WORDS:         %[[V:.+]] = tensor.expand_shape %[[C]]#1
// WORDS-NOT:     linalg.generic
// WORDS:         %[[C2:[0-9]+]]:5 = "spikingbrain_control.launch"({{.*}}%[[ROWS]]{{.*}}callee = @spike_encode_k64_g2_8_2_
// WORDS-DAG:     %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["pack_dot lanes=8 vectors=2 width=2 offset=0"], sources = ["w"]} : () -> tensor<3x32x2x16xi8>
// WORDS-DAG:     %[[S:.+]] = "spikingbrain.parameter"() {recipe = ["pack_columns block=16"], sources = ["s"]} : () -> tensor<3x1x16xf32>
// WORDS-DAG:     %[[B:.+]] = "spikingbrain.parameter"() {recipe = [], sources = ["b"]} : () -> tensor<40xf32>
// WORDS:         "spikingbrain_control.launch"({{.*}}%[[ROWS]], %[[C]]#0, %[[C]]#1, %[[C]]#2, %[[C]]#3, %[[C]]#4, %[[W]], %[[S]], %[[B]]{{.*}}callee = @[[I8]]
// WORDS:         %[[W4:.+]] = "spikingbrain.parameter"() {recipe = ["pack_nibbles lanes=8 vectors=2 width=2 offset=8"], sources = ["w4"]} : () -> tensor<2x16x2x16xi8>
// WORDS:         "spikingbrain_control.launch"({{.*}}%[[C2]]#4, %[[W4]], {{.*}}callee = @[[I4]]
// WORDS-NOT:     linalg.generic
// WORDS:         return {{.*}}, %[[V]]
//
// Waves multiply bytes by the matrix instruction. The model asks for the threshold, so the encoder is a launch; nibbles in groups of
// 32 channels, which are no whole chunks, get counts with gaps.
// WAVES:         __builtin_mxc_mma_16x16x16i8
// WAVES-LABEL: func.func @stored(
// WAVES:         %[[C:[0-9]+]]:5 = "spikingbrain_control.launch"({{.*}}callee = @spike_encode_k64_128_
// WAVES:         %[[C2:[0-9]+]]:5 = "spikingbrain_control.launch"({{.*}}callee = @spike_encode_k64_by32_128_128_
// WAVES:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["pack_dot lanes=16 vectors=1 width=16 offset=0", "words"], sources = ["w"]} : () -> tensor<3x4x64xi32>
// WAVES:         "spikingbrain_control.launch"({{.*}}%[[C]]#0, %[[C]]#1, %[[C]]#2, %[[C]]#3, %[[C]]#4, %[[W]], {{.*}}callee = @spike_linear_i8_l128_k64_g1_n40_m_bias
// WAVES:         "spikingbrain_control.launch"({{.*}}%[[C2]]#0, {{.*}}callee = @spike_linear_i4_l128_k64_g2_n20_m,
// WAVES-NOT:     linalg.generic
// WAVES:         return
func.func @stored(%x: tensor<1x?x64xf32>) -> (tensor<1x?x40xf32>, tensor<1x?x20xf32>, tensor<1x?xf32>) {
  %counts, %threshold = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}
      : (tensor<1x?x64xf32>) -> (tensor<1x?x64xf32>, tensor<1x?xf32>)
  %w = "spikingbrain.parameter"() {sources = ["w"], recipe = []} : () -> tensor<40x64xi8>
  %s = "spikingbrain.parameter"() {sources = ["s"], recipe = []} : () -> tensor<40x1xf32>
  %b = "spikingbrain.parameter"() {sources = ["b"], recipe = []} : () -> tensor<40xf32>
  %y = "spikingbrain.spike_linear"(%counts, %threshold, %w, %s, %b) {bits = 8 : i64}
      : (tensor<1x?x64xf32>, tensor<1x?xf32>, tensor<40x64xi8>, tensor<40x1xf32>, tensor<40xf32>) -> tensor<1x?x40xf32>
  %w4 = "spikingbrain.parameter"() {sources = ["w4"], recipe = []} : () -> tensor<20x64xi8>
  %s4 = "spikingbrain.parameter"() {sources = ["s4"], recipe = []} : () -> tensor<20x2xf32>
  %y4 = "spikingbrain.spike_linear"(%counts, %threshold, %w4, %s4) {bits = 4 : i64}
      : (tensor<1x?x64xf32>, tensor<1x?xf32>, tensor<20x64xi8>, tensor<20x2xf32>) -> tensor<1x?x20xf32>
  return %y, %y4, %threshold : tensor<1x?x40xf32>, tensor<1x?x20xf32>, tensor<1x?xf32>
}

// A head whose codes are the embedding's: look-ups read the packed form, and nothing else is stored. An id outside gives 0.
// WORDS-LABEL: func.func @head(
// WORDS-NOT:     recipe = []
// WORDS:         %[[T:.+]] = "spikingbrain.parameter"() {recipe = ["pack_nibbles lanes=8 vectors=2 width=2 offset=8"], sources = ["table"]} : () -> tensor<3x16x2x16xi8>
// WORDS:         linalg.generic {{.*}}ins(%{{.+}} : tensor<1x?xi64>)
// WORDS:           arith.cmpi ult, %{{.+}}, %c40
// WORDS:           %[[CODE:.+]] = tensor.extract %[[T]]
// WORDS:           %[[HIGH:.+]] = arith.shrui %[[CODE]], %c4_i8
// WORDS:           %[[LOW:.+]] = arith.andi %[[CODE]], %c15_i8
// WORDS:           %[[NIBBLE:.+]] = arith.select %{{.+}}, %[[LOW]], %[[HIGH]]
// WORDS:           arith.subi %[[NIBBLE]], %c8_i8
// WORDS:         %[[S:.+]] = "spikingbrain.parameter"() {recipe = ["pack_columns block=16"], sources = ["scale"]} : () -> tensor<3x2x16xf32>
// WORDS:         "spikingbrain.embedding"(%{{.+}}, %[[S]]) {rows = 40 : i64}
// WORDS:         "spikingbrain_control.launch"({{.*}}%[[T]], %[[S]]
func.func @head(%ids: tensor<1x?xi64>, %x: tensor<1x?x64xf32>) -> (tensor<1x?x64xi8>, tensor<1x?x2xf32>, tensor<1x?x40xf32>) {
  %table = "spikingbrain.parameter"() {sources = ["table"], recipe = []} : () -> tensor<40x64xi8>
  %scale = "spikingbrain.parameter"() {sources = ["scale"], recipe = []} : () -> tensor<40x2xf32>
  %rows = "spikingbrain.embedding"(%ids, %table) {rows = 40 : i64} : (tensor<1x?xi64>, tensor<40x64xi8>) -> tensor<1x?x64xi8>
  %scales = "spikingbrain.embedding"(%ids, %scale) {rows = 40 : i64} : (tensor<1x?xi64>, tensor<40x2xf32>) -> tensor<1x?x2xf32>
  %counts, %threshold = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}
      : (tensor<1x?x64xf32>) -> (tensor<1x?x64xf32>, tensor<1x?xf32>)
  %y = "spikingbrain.spike_linear"(%counts, %threshold, %table, %scale) {bits = 4 : i64}
      : (tensor<1x?x64xf32>, tensor<1x?xf32>, tensor<40x64xi8>, tensor<40x2xf32>) -> tensor<1x?x40xf32>
  return %rows, %scales, %y : tensor<1x?x64xi8>, tensor<1x?x2xf32>, tensor<1x?x40xf32>
}

// Experts: their weights are packed as those of one projection, with panels of their own; one encoder and one sorting of rows
// serve both products.
// WORDS-LABEL: func.func @experts(
// WORDS-SAME:      %[[X:[a-z0-9]+]]: tensor<?x8xf32>, %[[E:[a-z0-9]+]]: tensor<?xi64>
func.func @experts(%x: tensor<?x8xf32>, %e: tensor<?xi64>) -> (tensor<?x40xf32>, tensor<?x40xf32>) {
  %w = "spikingbrain.parameter"() {sources = ["codes"], recipe = []} : () -> tensor<3x40x8xi8>
  %s = "spikingbrain.parameter"() {sources = ["scale"], recipe = []} : () -> tensor<3x40x2xf32>
  %c, %v = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64} : (tensor<?x8xf32>) -> (tensor<?x8xf32>, tensor<?xf32>)
  // WORDS:         callee = @spike_encode
  // WORDS-NOT:     callee = @spike_encode
  // WORDS:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["stack block={{[0-9]+}}", "pack_dot {{[^"]+}}"], sources = ["codes"]}
  // WORDS:         %[[S:.+]] = "spikingbrain.parameter"() {recipe = ["stack block={{[0-9]+}}", "pack_columns block={{[0-9]+}}"], sources = ["scale"]}
  // WORDS:         %[[G:.+]]:3 = "spikingbrain_control.launch"({{.*}}%[[E]]{{.*}}) {callee = @group_rows_n3_m
  // WORDS:         "spikingbrain_control.launch"({{.*}}%[[W]], %[[S]], %[[G]]#0, %[[G]]#1{{.*}}) {callee = @[[KERNEL:spike_grouped_linear_i8_e3_k8_g2_n40_m]]
  // WORDS-NOT:     callee = @group_rows
  // WORDS:         callee = @[[KERNEL]]
  // WORDS:         return
  %y = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {bits = 8 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<3x40x8xi8>, tensor<3x40x2xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  %z = "spikingbrain.spike_grouped_linear"(%c, %v, %w, %s, %e) {bits = 8 : i64} : (tensor<?x8xf32>, tensor<?xf32>, tensor<3x40x8xi8>, tensor<3x40x2xf32>, tensor<?xi64>) -> tensor<?x40xf32>
  return %y, %z : tensor<?x40xf32>, tensor<?x40xf32>
}

// Nine tenths of the channels silent: the weight is stored by channel, and the channels that fire are listed, of 8 rows at most.
// WORDS-LABEL: func.func @events(
// WORDS:         %[[ROWS:.+]] = tensor.collapse_shape
// WORDS:         %[[LISTS:.+]] = arith.minsi %{{.+}}, %c8
// WORDS:         %[[C:[0-9]+]]:8 = "spikingbrain_control.launch"({{.*}}callee = @spike_encode_k64_g1_8_2_{{.*}}_events_m
// WORDS-DAG:     %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["pack_channels lanes=8 vectors=4 width=2 blocks=1 offset=0"], sources = ["w"]} : () -> tensor<2x64x2x16xi8>
// WORDS:         "spikingbrain_control.launch"({{.*}}%[[C]]#5, %[[C]]#6, %[[C]]#7, %[[W]]{{.*}}callee = @spike_events_i8_k64_g1_n40_m
// WORDS:         return
func.func @events(%x: tensor<1x?x64xf32>) -> tensor<1x?x40xf32> {
  %counts, %threshold = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}
      : (tensor<1x?x64xf32>) -> (tensor<1x?x64xf32>, tensor<1x?xf32>)
  %w = "spikingbrain.parameter"() {sources = ["w"], recipe = []} : () -> tensor<40x64xi8>
  %s = "spikingbrain.parameter"() {sources = ["s"], recipe = []} : () -> tensor<40x1xf32>
  %y = "spikingbrain.spike_linear"(%counts, %threshold, %w, %s) {bits = 8 : i64, silent = 0.9 : f64}
      : (tensor<1x?x64xf32>, tensor<1x?xf32>, tensor<40x64xi8>, tensor<40x1xf32>) -> tensor<1x?x40xf32>
  return %y : tensor<1x?x40xf32>
}

// Waves encode a few rows where they multiply them; for more there is a launch, and a kernel that goes on in the same memory. Groups of
// 24 channels are stored as 32.
// WAVES-LABEL: func.func @few_rows(
// WAVES-SAME:      %[[X:[a-z0-9]+]]: tensor<?x48xf32>
// WAVES:         %[[C:[0-9]+]]:5 = "spikingbrain_control.launch"({{.*}}callee = @spike_encode_k48_by24_64_
// WAVES:         %[[W:.+]] = "spikingbrain.parameter"() {recipe = ["pad_groups size=24 to=32", "pack_dot lanes=16 vectors=1 width=16 offset=0", "words"], sources = ["w"]} : () -> tensor<2x4x64xi32>
// WAVES:         %[[S:.+]] = "spikingbrain.parameter"
// WAVES:         %[[ARE_FEW:.+]] = arith.cmpi sle, %{{.+}}, %c2
// WAVES:         %[[FEW:.+]] = "spikingbrain_control.launch"({{.*}}%[[X]], %[[W]], %[[S]]{{.*}}callee = @spike_linear_i8_l128_k48_g2_n20_m_128_3p0_1em05_10000p0_x, tied = [-1]}
// WAVES:         "spikingbrain_control.launch"({{.*}}%[[C]]#4, %[[W]], %[[S]], %[[FEW]]) {callee = @spike_linear_i8_l128_k48_g2_n20_m, tied = [8]}
// WAVES:         return
func.func @few_rows(%x: tensor<?x48xf32>) -> tensor<?x20xf32> {
  %counts, %threshold = "spikingbrain.spike_encode"(%x) {k = 3.0 : f64, lower = 1.0e-5 : f64, upper = 1.0e4 : f64}
      : (tensor<?x48xf32>) -> (tensor<?x48xf32>, tensor<?xf32>)
  %w = "spikingbrain.parameter"() {sources = ["w"], recipe = []} : () -> tensor<20x48xi8>
  %s = "spikingbrain.parameter"() {sources = ["s"], recipe = []} : () -> tensor<20x2xf32>
  %y = "spikingbrain.spike_linear"(%counts, %threshold, %w, %s) {bits = 8 : i64}
      : (tensor<?x48xf32>, tensor<?xf32>, tensor<20x48xi8>, tensor<20x2xf32>) -> tensor<?x20xf32>
  return %y : tensor<?x20xf32>
}

// Counts that the model rounds itself, by a static threshold: their encoder has a threshold of 1, and the kernel for one row rounds.
// WAVES-LABEL: func.func @rounded(
// WAVES-SAME:      %[[X:[a-z0-9]+]]: tensor<1x48xf32>, %[[V:[a-z0-9]+]]: tensor<1xf32>
// WAVES-NOT:     linalg.generic
// WAVES:         %[[V1:.+]] = tensor.expand_shape %[[V]]
// WAVES:         "spikingbrain_control.launch"({{.*}}%[[X]], %[[V1]], {{.*}}callee = @spike_linear_i8_l128_k48_g1_n20_m1_128_1p0_1p0_1p0_{{[0-9a-f]+}},
// WAVES-NOT:     linalg.generic
// WAVES:         return
func.func @rounded(%x: tensor<1x48xf32>, %v: tensor<1xf32>) -> tensor<1x20xf32> {
  %e = tensor.empty() : tensor<1x48xf32>
  %c = linalg.generic {indexing_maps = [affine_map<(i, j) -> (i, j)>, affine_map<(i, j) -> (0)>, affine_map<(i, j) -> (i, j)>], iterator_types = ["parallel", "parallel"]}
      ins(%x, %v : tensor<1x48xf32>, tensor<1xf32>) outs(%e : tensor<1x48xf32>) {
  ^bb0(%a: f32, %b: f32, %o: f32):
    %q = arith.divf %a, %b : f32
    %r = math.roundeven %q : f32
    linalg.yield %r : f32
  } -> tensor<1x48xf32>
  %counts, %threshold = "spikingbrain.spike_encode"(%c) {k = 1.0 : f64, lower = 1.0 : f64, upper = 1.0 : f64} : (tensor<1x48xf32>) -> (tensor<1x48xf32>, tensor<1xf32>)
  %w = "spikingbrain.parameter"() {sources = ["w"], recipe = []} : () -> tensor<20x48xi8>
  %s = "spikingbrain.parameter"() {sources = ["s"], recipe = []} : () -> tensor<20x1xf32>
  %y = "spikingbrain.spike_linear"(%counts, %threshold, %w, %s) {bits = 8 : i64} : (tensor<1x48xf32>, tensor<1xf32>, tensor<20x48xi8>, tensor<20x1xf32>) -> tensor<1x20xf32>
  return %y : tensor<1x20xf32>
}
