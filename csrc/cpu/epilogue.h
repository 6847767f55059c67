// From 16 neighbouring results of a row to y: gate, residual, the cast. Also loads of 16 elements of any type.
// Included once per instruction set by each_isa.h.

constexpr int64_t bytes_in(Dtype t) { return t == Dtype::kFloat ? 4 : 2; }

template <Dtype T>
FI_INLINE void load_chunk(const char* p, Float* out) {  // 16 elements as floats
  FI_UNROLL
  for (int v = 0; v < kLineVecs; ++v) out[v] = load_as_float<T>(p + v * kLanes * bytes_in(T));
}

template <Dtype T>
FI_INLINE void load_some(const char* p, int64_t count, Float* out) {  // the same, those past `count` 0
  if (count >= kChunk) return load_chunk<T>(p, out);
  alignas(64) char padded[kChunk * 4] = {};
  if (count > 0) std::memcpy(padded, p, count * bytes_in(T));
  load_chunk<T>(padded, out);
}

inline void load_some(Dtype type, const char* p, int64_t index, int64_t count, float* out) {
  Float values[kLineVecs];
  p += index * bytes_of(type);
  if (type == Dtype::kFloat) load_some<Dtype::kFloat>(p, count, values);
  if (type == Dtype::kBFloat16) load_some<Dtype::kBFloat16>(p, count, values);
  if (type == Dtype::kHalf) load_some<Dtype::kHalf>(p, count, values);
  for (int v = 0; v < kLineVecs; ++v) store(out + v * kLanes, values[v]);
}

template <Dtype T>
FI_INLINE void store_some(char* p, int64_t count, const Float* values) {  // the first `count` of 16 elements
  alignas(64) char padded[kChunk * 4];
  char* target = count < kChunk ? padded : p;
  FI_UNROLL
  for (int v = 0; v < kLineVecs; ++v) store_from_float<T>(target + v * kLanes * bytes_in(T), values[v]);
  if (count < kChunk) std::memcpy(p, padded, count * bytes_in(T));
}

// eᵗ = (1 + r · sum) · power: 2ⁿ times the Taylor series around 0 of what is left of t.
struct Exp {
  Float r, sum, power;

  FI_INLINE explicit Exp(Float t) {
    t = clamp(t, 87.0f);  // keeps 2ⁿ a normal number
    const Int n = round_to_int(mul(t, broadcast(1.44269504f)));
    const Float whole = to_float(n);
    r = fma(whole, broadcast(-0.693359375f), t);  // ln 2 in two parts, the first exact in few bits
    r = fma(whole, broadcast(2.12194440e-4f), r);
    sum = broadcast(1.0f / 5040);
    sum = fma(sum, r, broadcast(1.0f / 720));
    sum = fma(sum, r, broadcast(1.0f / 120));
    sum = fma(sum, r, broadcast(1.0f / 24));
    sum = fma(sum, r, broadcast(1.0f / 6));
    sum = fma(sum, r, broadcast(0.5f));
    sum = fma(sum, r, broadcast(1.0f));
    power = power_of_two(n);
  }
};

// Wrong by about one unit in the last place.
inline Float exp_float(Float t) {
  const Exp e(t);
  return mul(fma(e.sum, e.r, broadcast(1.0f)), e.power);
}

// (e²ᵗ − 1) / (e²ᵗ + 1), without the cancellation near 0.
inline Float tanh_float(Float t) {
  const Exp e(add(t, t));
  const Float minus_1 = fma(mul(e.sum, e.r), e.power, sub(e.power, broadcast(1.0f)));
  return div(minus_1, add(minus_1, broadcast(2.0f)));
}

inline Float gelu(Float v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) lanes[i] *= 0.5f * (1.0f + std::erf(lanes[i] * 0.70710678f));
  return load(lanes);
}

// Each activation of a gate; tanh(u) = 2 · sigmoid(2u) − 1 makes gelu's approximation v · sigmoid(2u).
inline Float activate(Gate gate, Float v) {
  if (gate == Gate::kGelu) return gelu(v);
  Float t = v;
  if (gate == Gate::kGeluTanh) {
    t = mul(mul(v, broadcast(1.59576912f)), fma(mul(v, v), broadcast(0.044715f), broadcast(1.0f)));
  }
  return div(v, add(broadcast(1.0f), exp_float(sub(zero_float(), t))));
}

// LAYOUTS.md#gate-up: the first 8 of 16 values times the others, after the activation. Leaves them in front.
inline void apply_gate(Gate gate, Float* values) {
  alignas(64) float strip[2 * kPanel];
  for (int v = 0; v < kLineVecs; ++v) store(strip + v * kLanes, values[v]);
  store(strip + kPanel, zero_float());
  values[0] = mul(activate(gate, load(strip)), load(strip + kGateRows));
}

// 16 columns of v, bias included, from `column` on in `row`; what lies past N is left out. Overwrites the values.
template <Dtype T>
FI_NOINLINE void store_panel(const Output& out, int64_t row, int64_t column, Float* values) {
  int64_t at = row * out.n + column, count = out.n - column < kPanel ? out.n - column : kPanel;
  if (out.gate != Gate::kNone) {
    apply_gate(out.gate, values);
    at /= 2, count = kGateRows;
  }
  if (out.residual != nullptr) {
    Float residual[kLineVecs];
    load_some<T>(out.residual + at * bytes_in(T), count, residual);
    for (int v = 0; v < kLineVecs; ++v) values[v] = add(values[v], residual[v]);
  }
  store_some<T>(out.y + at * bytes_in(T), count, values);
}
