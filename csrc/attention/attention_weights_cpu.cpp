// The softmax's weights for whoever wants to look at them: of each head, or their mean over the heads, which
// is all that leaves the kernel then.
//
// P = exp(S − logsumexp), from the log-sum-exp that the forward has computed, tile by tile as in the
// backward; a tile of the mean is summed up over all heads in scratch and written once. Rows and keys are cut
// as in the forward. What no row of a tile sees is zero and is not computed; so is a dead row, whose
// log-sum-exp is −inf (attention_cpu.cpp). Dropout is not applied: these are the weights before it, as
// torch's are.
#include "attention/attention_by_keys.h"

namespace {

using namespace fastgan;

constexpr int64_t kWeightRows = 96, kWeightKeys = 256;

template <class T>
struct WeightScratch {
  explicit WeightScratch(const AttentionArgs& a)
      : rows(smaller(a.rows, kWeightRows)),
        keys(whole_panels<T>(smaller(a.columns, kWeightKeys))),
        stride(keys + kPanel<T>),  // a tile may begin between two panels
        width(a.width) {}
  void place(Scratch& s) {
    query = s.take<T>(rows * width);
    key = s.take<T>(keys * width);
    scores = s.take<T>(rows * keys);
    sums = s.take<T>(rows * stride);
  }
  int64_t rows, keys, stride, width;
  void* memory = nullptr;
  T *query, *key, *scores, *sums;
};

template <class Storage, class T>
void add_weights(const AttentionArgs& a, WeightScratch<T>& s, Tile t, int64_t key0) {
  constexpr int W = lanes<T>;
  const int64_t kv_head = t.head / (a.heads / a.kv_heads);
  if (a.is_causal) t.columns = smaller(t.columns, t.row + t.rows - t.column);
  if (t.columns <= 0) return;
  const Range seen = visible<Storage>(a, t);
  t.column += seen.begin;
  t.columns = seen.end - seen.begin;
  if (t.columns <= 0) return;
  pack_rows<T>(at<Storage>(a.query, t.batch, t.head, t.row), a.query.stride[2], a.query.stride[3], t.rows,
               a.width, s.query);
  if (!one_row_in_place(a))
    pack_transposed<T>(at<Storage>(a.key, t.batch, kv_head, t.column), a.key.stride[2], a.key.stride[3],
                       t.columns, a.width, s.key);
  const int64_t padded = whole_panels<T>(t.columns);
  scores_of<Storage>(a, t, s.query, s.key, s.scores, s.keys);
  for (int64_t r = 0; r < t.rows; ++r) {
    const LogSumExp<T> logsumexp = logsumexp_of<T>(a, t, r);
    const T* scores = s.scores + r * s.keys;
    T* sums = s.sums + r * s.stride + t.column - key0;
    for (int64_t c = 0; c < padded; c += W)
      store(sums + c, load<T>(sums + c) + logsumexp.probability(load<T>(scores + c)));
  }
}

template <class Storage>
void weights(const AttentionArgs& a, const Threads& threads) {
  using T = Accumulate<Storage>;
  const int64_t chunks = (a.rows + kWeightRows - 1) / kWeightRows;
  const int64_t together = a.average_weights ? a.heads : 1, outer = a.average_weights ? 1 : a.heads;
  const int64_t cost = together * smaller(a.rows, kWeightRows) * a.columns * (a.width + 16);
  parallel_for(threads, a.batch * outer * chunks, grain(cost), [&](int64_t begin, int64_t end) {
    WeightScratch<T> s(a);
    if (!allocate(s, a)) return;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t batch = piece / chunks / outer, head = piece / chunks % outer;
      const int64_t row = piece % chunks * kWeightRows, rows = smaller(kWeightRows, a.rows - row);
      for (int64_t key0 = 0; key0 < a.columns; key0 += kWeightKeys) {
        const int64_t keys = smaller(kWeightKeys, a.columns - key0);
        for (int64_t i = 0; i < rows * s.stride; ++i) s.sums[i] = T(0);
        for (int64_t h = head; h < head + together; ++h)
          add_weights<Storage, T>(a, s, Tile{batch, h, row, key0, rows, keys}, key0);
        for (int64_t r = 0; r < rows; ++r)
          store_row<T>(s.sums + r * s.stride, T(1) / T(together), keys,
                       at<Storage>(a.weights, batch, head, row + r) + key0);
      }
    }
    std::free(s.memory);
  });
}

}  // namespace

FASTGAN_ATTENTION_ENTRY(attention_weights, weights)
