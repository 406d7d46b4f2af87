// Lion in one pass: Chen et al., "Symbolic discovery of optimization algorithms", 2023, algorithm 2.
// Plain C at the border, so that one binary serves every version of torch and Python.
#include <cstdint>

extern "C" void lantern_lion(float* weights, const float* gradient, float* momentum, int64_t count,
                             float scale, float lr, float beta1, float beta2, float weight_decay) {
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = gradient[i] * scale;
    const float direction = momentum[i] * beta1 + scaled * (1 - beta1);
    const float sign = static_cast<float>(direction > 0) - static_cast<float>(direction < 0);
    weights[i] = weights[i] * (1 - lr * weight_decay) - sign * lr;
    momentum[i] = momentum[i] * beta2 + scaled * (1 - beta2);
  }
}
