// Attention's derivative along a direction, and the derivative of its backward: forward mode, and gradients
// of gradients (penalties, R1, Hessian-vector products), in memory linear in the sequence.
//
// With a direction u = (uQ, uK, uV, ub), M the dropout mask with its factor, and P = exp(S − logsumexp):
//
//   S' = scale (uQ Kᵀ + Q uKᵀ) + ub     r = rowsum(P ∘ S')      P' = P ∘ (S' − r)
//   O' = (M ∘ P') V + (M ∘ P) uV
//
// is the jvp. For the gradients, which are those of gO · O, the derivative along u is
//
//   G  = M ∘ (gO Vᵀ)     D  = rowsum(P ∘ G) = gO · O          dS  = P ∘ (G − D)
//   G' = M ∘ (gO uVᵀ)    D' = gO · O'                         dS' = P' ∘ (G − D) + P ∘ (G' − D')
//   dQ' = scale (dS' K + dS uK)    dK' = scale (dS'ᵀ Q + dSᵀ uQ)    dV' = (M ∘ P')ᵀ gO    db' = dS'
//
// and since a Hessian is symmetric this is at once the vjp of the backward by u; what that vjp adds, the
// gradient of gO, is O'.
//
// The jvp goes over rows as the forward does, but knows the log-sum-exp, so that nothing is rescaled. r is
// not known before the row's end: Σ P ∘ S' V is summed up and r O taken off. A row that one tile has whole
// knows r in time, and P' is then what is multiplied: a probability of 1 has a tangent of exactly 0. The
// second pass has the row sums and goes over keys as the backward does (attention_by_keys.h); a tile that has
// whole rows sums up its own there, for the same reason. Absent directions are neither packed nor multiplied.
// All together 5 products of the forward's size in the first pass and 10 in the second; the composed formula
// has 15, too, and about twenty passes over S×T matrices in memory.
//
// 48 rows by 128 keys: four score tiles and twelve packed ones have to share L2.
#include "attention/attention_by_keys.h"
#include "attention/attention_tiles.h"

namespace {

using namespace fastgan;

constexpr int64_t kSecondRows = 48, kJvpChunk = 192;

template <class T>
T& row_sum(const AttentionArgs& a, int which, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(a.row_sums)[which * row_count(a) + row_index(a, batch, head, row)];
}

// uQ Kᵀ + Q uKᵀ from packed tiles, times scale, plus ub. Returns what it still has to be multiplied with: the
// scale, unless that has been done.
template <class Storage, class T>
T tangent_scores(const AttentionArgs& a, const Tile& t, const T* query, const T* tangent_query, const T* key,
                 const T* tangent_key, T* scores, int64_t stride) {
  const int64_t padded = whole_panels<T>(t.columns), panel = a.width * kPanel<T>;
  if (a.tangent_query.data)
    multiply<false, Update::set>(
        Product<T>{t.rows, padded, a.width, tangent_query, a.width, key, panel, scores, stride});
  if (a.tangent_key.data) {
    Product<T> product{t.rows, padded, a.width, query, a.width, tangent_key, panel, scores, stride};
    if (a.tangent_query.data)
      multiply<false, Update::add>(product);
    else
      multiply<false, Update::set>(product);
  }
  const bool any = a.tangent_query.data || a.tangent_key.data;
  if (any && !a.tangent_bias.data) return T(a.scale);
  for (int64_t r = 0; r < t.rows; ++r, scores += stride) {
    for (int64_t c = 0; c < padded; ++c) scores[c] = any ? scores[c] * T(a.scale) : T(0);
    if (!a.tangent_bias.data) continue;
    int64_t step = a.tangent_bias.stride[3], row = t.row + r;
    if (a.bias_dtype == a.dtype)
      add_bias<T>(scores, t.columns, at<Storage>(a.tangent_bias, t.batch, t.head, row) + t.column * step,
                  step);
    else if constexpr (sizeof(Storage) == 2)
      add_bias<T>(scores, t.columns, at<float>(a.tangent_bias, t.batch, t.head, row) + t.column * step, step);
  }
  return T(1);
}

template <class Storage, class T>
void pack_rows_of(const AttentionInput& x, int64_t batch, int64_t head, int64_t row, int64_t rows,
                  int64_t width, T* to) {
  if (x.data) pack_rows<T>(at<Storage>(x, batch, head, row), x.stride[2], x.stride[3], rows, width, to);
}
template <class Storage, class T>
void pack_panels_of(const AttentionInput& x, int64_t batch, int64_t head, int64_t row, int64_t rows,
                    int64_t width, T* to) {
  if (x.data) pack_panels<T>(at<Storage>(x, batch, head, row), x.stride[2], x.stride[3], rows, width, to);
}
template <class Storage, class T>
void pack_transposed_of(const AttentionInput& x, int64_t batch, int64_t head, int64_t row, int64_t rows,
                        int64_t width, T* to) {
  if (x.data) pack_transposed<T>(at<Storage>(x, batch, head, row), x.stride[2], x.stride[3], rows, width, to);
}

// ---- the jvp: over rows ----

template <class T>
struct JvpScratch {
  explicit JvpScratch(const AttentionArgs& a)
      : chunk(smaller(a.rows, kJvpChunk)),
        block(smaller(a.rows, kSecondRows)),
        keys(whole_panels<T>(smaller(a.columns, kKeyBlock))),
        width(a.width),
        value_width(whole_panels<T>(a.value_width)) {}
  void place(Scratch& s) {
    query = s.take<T>(chunk * width);
    tangent_query = s.take<T>(chunk * width);
    key = s.take<T>(keys * width);
    tangent_key = s.take<T>(keys * width);
    value = s.take<T>(keys * value_width);
    tangent_value = s.take<T>(keys * value_width);
    scores = s.take<T>(block * keys);
    tangents = s.take<T>(block * keys);
    output = s.take<T>(chunk * value_width);
    means = s.take<T>(chunk);
    words = s.take<uint32_t>(keys + kPhiloxStep);
  }
  int64_t chunk, block, keys, width, value_width;
  void* memory = nullptr;
  T *query, *tangent_query, *key, *tangent_key, *value, *tangent_value, *scores, *tangents, *output, *means;
  uint32_t* words;
};

// From S and S' (to be multiplied with factor): M ∘ P and M ∘ P ∘ S', or M ∘ P' where the tile has whole
// rows; adds to the rows' sums of P ∘ S'.
template <class T>
void jvp_tile(const AttentionArgs& a, JvpScratch<T>& s, const Tile& t, T factor, T* means) {
  constexpr int W = lanes<T>;
  const int64_t padded = whole_panels<T>(t.columns);
  const bool whole_row = a.columns <= kKeyBlock;
  const T kept_scale = T(a.kept_scale);
  for (int64_t r = 0; r < t.rows; ++r) {
    T* scores = s.scores + r * s.keys;
    T* tangents = s.tangents + r * s.keys;
    const LogSumExp<T> logsumexp = logsumexp_of<T>(a, t, r);
    Vec<T> sums{};
    for (int64_t c = 0; c < padded; c += W) {
      Vec<T> p = logsumexp.probability(load<T>(scores + c)), d = load<T>(tangents + c) * factor;
      store(scores + c, p);
      store(tangents + c, whole_row ? d : p * d);
      sums += p * d;
    }
    T mean = sum<T>(sums);
    means[r] += mean;
    if (whole_row)
      for (int64_t c = 0; c < padded; c += W)
        store(tangents + c, load<T>(scores + c) * (load<T>(tangents + c) - mean));
    if (!a.has_dropout) continue;
    draw(a, t, r, s.words);
    for (int64_t c = 0; c < padded; c += W) {
      Mask<T> keep = kept<T>(s.words + c, a.threshold);
      store(scores + c, select(keep, load<T>(scores + c) * kept_scale, Vec<T>{}));
      store(tangents + c, select(keep, load<T>(tangents + c) * kept_scale, Vec<T>{}));
    }
  }
}

template <class Storage, class T>
void jvp_piece(const AttentionArgs& a, JvpScratch<T>& s, int64_t batch, int64_t head, int64_t row0,
               int64_t rows) {
  const int64_t kv_head = head / (a.heads / a.kv_heads), panel = kPanel<T>;
  pack_rows_of<Storage>(a.query, batch, head, row0, rows, a.width, s.query);
  pack_rows_of<Storage>(a.tangent_query, batch, head, row0, rows, a.width, s.tangent_query);
  for (int64_t r = 0; r < rows; ++r) s.means[r] = T(0);
  for (int64_t i = 0; i < rows * s.value_width; ++i) s.output[i] = T(0);
  const bool tangent_scored = a.tangent_query.data || a.tangent_key.data || a.tangent_bias.data;

  int64_t end = a.is_causal ? smaller(a.columns, seen_columns(a, row0 + rows, 0)) : a.columns;
  for (int64_t key0 = 0; key0 < end; key0 += kKeyBlock) {
    const Range seen =
        visible<Storage>(a, Tile{batch, head, row0, key0, rows, smaller(kKeyBlock, end - key0)});
    const int64_t first = key0 + seen.begin, keys = seen.end - seen.begin;
    if (keys <= 0) continue;
    pack_transposed_of<Storage>(a.key, batch, kv_head, first, keys, a.width, s.key);
    pack_transposed_of<Storage>(a.tangent_key, batch, kv_head, first, keys, a.width, s.tangent_key);
    pack_panels_of<Storage>(a.value, batch, kv_head, first, keys, a.value_width, s.value);
    pack_panels_of<Storage>(a.tangent_value, batch, kv_head, first, keys, a.value_width, s.tangent_value);
    for (int64_t block = 0; block < rows; block += kSecondRows) {
      Tile t{batch, head, row0 + block, first, smaller(kSecondRows, rows - block), keys};
      if (a.is_causal) t.columns = smaller(keys, seen_columns(a, t.row + t.rows, first));
      if (t.columns > 0 && (a.mask.data || a.bias.data))
        t.columns = smaller(t.columns, visible<Storage>(a, t).end);
      if (t.columns <= 0) continue;
      const T* query = s.query + block * a.width;
      scores_of<Storage>(a, t, query, s.key, s.scores, s.keys);
      T factor = tangent_scores<Storage>(a, t, query, s.tangent_query + block * a.width, s.key, s.tangent_key,
                                         s.tangents, s.keys);
      jvp_tile<T>(a, s, t, factor, s.means + block);
      T* output = s.output + block * s.value_width;
      if (tangent_scored)
        multiply<false, Update::add>(Product<T>{t.rows, s.value_width, t.columns, s.tangents, s.keys, s.value,
                                                keys * panel, output, s.value_width});
      if (a.tangent_value.data)
        multiply<false, Update::add>(Product<T>{t.rows, s.value_width, t.columns, s.scores, s.keys,
                                                s.tangent_value, keys * panel, output, s.value_width});
    }
  }
  const bool whole_row = a.columns <= kKeyBlock;
  for (int64_t r = 0; r < rows; ++r) {
    T* output = s.output + r * s.value_width;
    const Storage* saved = at<Storage>(a.saved_output, batch, head, row0 + r);
    for (int64_t c = 0; !whole_row && tangent_scored && c < a.value_width; ++c)
      output[c] -= s.means[r] * load1<T>(saved + c * a.saved_output.stride[3]);
    store_row<T>(output, T(1), a.value_width, at<Storage>(a.tangent_output, batch, head, row0 + r));
    if (!a.row_sums) continue;
    const Storage* grad = at<Storage>(a.grad_output, batch, head, row0 + r);
    T with_saved = T(0);
    for (int64_t c = 0; c < a.value_width; ++c)
      with_saved +=
          load1<T>(grad + c * a.grad_output.stride[3]) * load1<T>(saved + c * a.saved_output.stride[3]);
    row_sum<T>(a, 0, batch, head, row0 + r) = s.means[r];
    row_sum<T>(a, 1, batch, head, row0 + r) = with_saved;
    row_sum<T>(a, 2, batch, head, row0 + r) = dot<T>(output, grad, a.grad_output.stride[3], a.value_width);
  }
}

template <class Storage>
void jvp(const AttentionArgs& a, const Threads& threads) {
  using T = Accumulate<Storage>;
  auto chunks_of = [](const AttentionArgs& one) { return (one.rows + kJvpChunk - 1) / kJvpChunk; };
  auto cut = [&](const AttentionArgs& one) -> Pieces {
    int64_t cost = smaller(one.rows, kJvpChunk) * one.columns * (3 * one.width + 2 * one.value_width + 16);
    return {one.heads * chunks_of(one), cost};
  };
  in_pieces<Storage>(a, threads, a.batch, cut, [&](auto for_each) {
    JvpScratch<T> scratch(a);
    if (!allocate(scratch, a)) return;
    for_each([&](const AttentionArgs& one, int64_t batch, int64_t piece) {
      const int64_t chunks = chunks_of(one), row = in_turn(one, piece % chunks, chunks) * kJvpChunk;
      jvp_piece<Storage, T>(one, scratch, batch, piece / chunks, row, smaller(kJvpChunk, one.rows - row));
    });
    release(scratch);
  });
}

// ---- the derivative of the gradients: over keys ----

template <class T>
struct SecondScratch : KeyScratch<T> {
  using Base = KeyScratch<T>;
  using Base::keys, Base::padded, Base::padded_value, Base::rows, Base::stride, Base::value_width,
      Base::width;
  explicit SecondScratch(const AttentionArgs& a) : Base(a, kSecondRows) {}
  void place(Scratch& s) {
    Base::place(s);
    query = s.take<T>(rows * width);
    query_panels = s.take<T>(rows * padded);
    tangent_query = s.take<T>(rows * width);
    tangent_query_panels = s.take<T>(rows * padded);
    grad = s.take<T>(rows * value_width);
    grad_panels = s.take<T>(rows * padded_value);
    key = s.take<T>(keys * width);
    key_panels = s.take<T>(keys * padded);
    tangent_key = s.take<T>(keys * width);
    tangent_key_panels = s.take<T>(keys * padded);
    value = s.take<T>(keys * value_width);
    tangent_value = s.take<T>(keys * value_width);
    scores = s.take<T>(rows * stride);
    tangents = s.take<T>(rows * stride);
    grads = s.take<T>(rows * stride);
    grad_tangents = s.take<T>(rows * stride);
    this->bias_scores = grad_tangents;
  }
  T *query, *query_panels, *tangent_query, *tangent_query_panels, *grad, *grad_panels, *key, *key_panels,
      *tangent_key, *tangent_key_panels, *value, *tangent_value, *scores, *tangents, *grads, *grad_tangents;
};

// M ∘ P' in scores, dS in grads, dS' in grad_tangents.
template <class Storage, class T>
void second_tile(const AttentionArgs& a, SecondScratch<T>& s, const Tile& t) {
  constexpr int W = lanes<T>;
  const int64_t padded = whole_panels<T>(t.columns), panel = a.value_width * kPanel<T>;
  pack_rows_of<Storage>(a.query, t.batch, t.head, t.row, t.rows, a.width, s.query);
  pack_panels_of<Storage>(a.query, t.batch, t.head, t.row, t.rows, a.width, s.query_panels);
  pack_rows_of<Storage>(a.tangent_query, t.batch, t.head, t.row, t.rows, a.width, s.tangent_query);
  pack_panels_of<Storage>(a.tangent_query, t.batch, t.head, t.row, t.rows, a.width, s.tangent_query_panels);
  pack_rows_of<Storage>(a.grad_output, t.batch, t.head, t.row, t.rows, a.value_width, s.grad);
  pack_panels_of<Storage>(a.grad_output, t.batch, t.head, t.row, t.rows, a.value_width, s.grad_panels);
  scores_of<Storage>(a, t, s.query, s.key, s.scores, s.stride);
  const T factor =
      tangent_scores<Storage>(a, t, s.query, s.tangent_query, s.key, s.tangent_key, s.tangents, s.stride);
  multiply<false, Update::set>(
      Product<T>{t.rows, padded, a.value_width, s.grad, a.value_width, s.value, panel, s.grads, s.stride});
  if (a.tangent_value.data)
    multiply<false, Update::set>(Product<T>{t.rows, padded, a.value_width, s.grad, a.value_width,
                                            s.tangent_value, panel, s.grad_tangents, s.stride});
  const bool whole_row = a.columns <= kKeyBlock;
  const T kept_scale = T(a.kept_scale);
  for (int64_t r = 0; r < t.rows; ++r) {
    T* scores = s.scores + r * s.stride;
    T* tangents = s.tangents + r * s.stride;
    T* grads = s.grads + r * s.stride;
    T* grad_tangents = s.grad_tangents + r * s.stride;
    const LogSumExp<T> logsumexp = logsumexp_of<T>(a, t, r);
    if (a.has_dropout) draw(a, t, r, s.words);
    Vec<T> means{}, deltas{}, delta_tangents{};
    for (int64_t c = 0; c < padded; c += W) {
      Vec<T> p = logsumexp.probability(load<T>(scores + c)), d = load<T>(tangents + c) * factor;
      Vec<T> g = load<T>(grads + c), h = a.tangent_value.data ? load<T>(grad_tangents + c) : Vec<T>{};
      if (a.has_dropout) {
        Mask<T> keep = kept<T>(s.words + c, a.threshold);
        g = select(keep, g * kept_scale, Vec<T>{});
        h = select(keep, h * kept_scale, Vec<T>{});
      }
      means += p * d;
      deltas += p * g;
      store(scores + c, p);
      store(tangents + c, d);
      store(grads + c, g);
      store(grad_tangents + c, h);
    }
    const int64_t row = t.row + r;
    const T mean = whole_row ? sum<T>(means) : row_sum<T>(a, 0, t.batch, t.head, row);
    const T delta = whole_row ? sum<T>(deltas) : row_sum<T>(a, 1, t.batch, t.head, row);
    for (int64_t c = 0; c < padded; c += W) {  // P' (S' − r), G − D
      Vec<T> p = load<T>(scores + c), p_tangent = p * (load<T>(tangents + c) - mean), g = load<T>(grads + c);
      delta_tangents += p_tangent * g + p * load<T>(grad_tangents + c);
      store(tangents + c, p_tangent);
      store(grads + c, g - delta);
    }
    const T delta_tangent = whole_row ? sum<T>(delta_tangents) : row_sum<T>(a, 2, t.batch, t.head, row);
    for (int64_t c = 0; c < padded; c += W) {
      Vec<T> p = load<T>(scores + c), p_tangent = load<T>(tangents + c), g = load<T>(grads + c);
      store(grad_tangents + c, p_tangent * g + p * (load<T>(grad_tangents + c) - delta_tangent));
      store(grads + c, p * g);
      if (a.has_dropout)
        p_tangent = select(kept<T>(s.words + c, a.threshold), p_tangent * kept_scale, Vec<T>{});
      store(scores + c, p_tangent);
    }
  }
}

template <class S>
struct SecondPass {
  using Storage = S;
  using T = Accumulate<S>;
  using Scratch = SecondScratch<T>;
  static constexpr int64_t kRows = kSecondRows, panel = kPanel<T>;

  static void pack_keys(const AttentionArgs& a, Scratch& s, int64_t batch, int64_t kv_head, int64_t key0,
                        int64_t keys) {
    pack_transposed_of<S>(a.key, batch, kv_head, key0, keys, a.width, s.key);
    pack_panels_of<S>(a.key, batch, kv_head, key0, keys, a.width, s.key_panels);
    pack_transposed_of<S>(a.tangent_key, batch, kv_head, key0, keys, a.width, s.tangent_key);
    pack_panels_of<S>(a.tangent_key, batch, kv_head, key0, keys, a.width, s.tangent_key_panels);
    pack_transposed_of<S>(a.value, batch, kv_head, key0, keys, a.value_width, s.value);
    pack_transposed_of<S>(a.tangent_value, batch, kv_head, key0, keys, a.value_width, s.tangent_value);
  }
  static void tile(const AttentionArgs& a, Scratch& s, const Tile& t) { second_tile<S>(a, s, t); }
  static void key_gradients(const AttentionArgs& a, Scratch& s, const Tile& t) {
    multiply<true, Update::add>(Product<T>{t.columns, s.padded_value, t.rows, s.scores, s.stride,
                                           s.grad_panels, t.rows * panel, s.grad_value, s.padded_value});
    multiply<true, Update::add>(Product<T>{t.columns, s.padded, t.rows, s.grad_tangents, s.stride,
                                           s.query_panels, t.rows * panel, s.grad_key, s.padded});
    if (a.tangent_query.data)
      multiply<true, Update::add>(Product<T>{t.columns, s.padded, t.rows, s.grads, s.stride,
                                             s.tangent_query_panels, t.rows * panel, s.grad_key, s.padded});
  }
  static void query_gradient(const AttentionArgs& a, Scratch& s, const Tile& t, int64_t keys, QuerySum<T> sum,
                             bool first) {
    Product<T> product{t.rows,       a.width,      t.columns, s.grad_tangents, s.stride,
                       s.key_panels, keys * panel, sum.data,  sum.stride};
    if (first)
      multiply<false, Update::set>(product);
    else
      multiply<false, Update::add>(product);
    if (!a.tangent_key.data) return;
    product.a = s.grads;
    product.b = s.tangent_key_panels;
    multiply<false, Update::add>(product);
  }
};

template <class Storage>
void double_backward(const AttentionArgs& a, const Threads& threads) {
  run_by_keys<SecondPass<Storage>>(a, threads, 7 * a.width + 3 * a.value_width);
}

}  // namespace

FASTGAN_ATTENTION_ENTRY(attention_jvp, jvp)
FASTGAN_ATTENTION_ENTRY(attention_double_backward, double_backward)
