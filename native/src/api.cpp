// The C interface: exceptions become a status and a message, and nothing else leaves the library.
#include <new>
#include <string>
#include <system_error>

#include "engine.h"

namespace {

constexpr const char *NOT_FINITE = "the logits are not finite: the weights hold NaN or infinite values, or the activations overflow (an fp16 cache: keys or values beyond 65504)";

thread_local std::string error_text;

int fail(int status, const char *text) {
  try {
    error_text = text;
  } catch (...) {
    error_text.clear();
  }
  return status;
}

template <class Work> int guarded(Work work) {
  try {
    return work();
  } catch (const BadValue &error) {
    return fail(DEJAVU_BAD_VALUE, error.what());
  } catch (const std::bad_alloc &) {
    return fail(DEJAVU_NO_MEMORY, "out of memory");
  } catch (const std::system_error &error) {
    return fail(DEJAVU_NO_MEMORY, error.what());
  } catch (const std::exception &error) {
    return fail(DEJAVU_INTERNAL, error.what());
  } catch (...) {
    return fail(DEJAVU_INTERNAL, "unknown error");
  }
}

}  // namespace

extern "C" {

int dejavu_abi_version(void) { return DEJAVU_ABI_VERSION; }

const char *dejavu_error(void) { return error_text.c_str(); }

const char *dejavu_instruction_sets(void) { return instruction_set_names(); }

int dejavu_model_new(const dejavu_config *config, dejavu_model **out) {
  return guarded([&] {
    require(config != nullptr && out != nullptr, "a pointer is missing");
    *out = new dejavu_model(*config);
    return DEJAVU_OK;
  });
}

int dejavu_model_set(dejavu_model *model, int part, int64_t layer, const dejavu_matrix *matrix) {
  return guarded([&] {
    require(model != nullptr && matrix != nullptr, "a pointer is missing");
    model->set(part, layer, *matrix);
    return DEJAVU_OK;
  });
}

int dejavu_model_set_mlp(dejavu_model *model, int64_t layer, const dejavu_matrix *gate, const dejavu_matrix *up, const dejavu_matrix *down) {
  return guarded([&] {
    require(model != nullptr && up != nullptr && down != nullptr, "a pointer is missing");
    model->set_mlp(layer, gate, *up, *down);
    return DEJAVU_OK;
  });
}

int dejavu_model_window(dejavu_model *model, int64_t layer, int64_t window) {
  return guarded([&] {
    require(model != nullptr, "a pointer is missing");
    model->set_window(layer, window);
    return DEJAVU_OK;
  });
}

void dejavu_model_free(dejavu_model *model) { delete model; }

int dejavu_engine_new(const dejavu_model *model, int threads, int64_t max_rows, const char *instruction_set, dejavu_engine **out) {
  return guarded([&] {
    require(model != nullptr && out != nullptr, "a pointer is missing");
    require(threads >= 1 && threads <= 1024, "threads must lie between 1 and 1024, not " + std::to_string(threads));
    require(max_rows >= 1 && max_rows <= 64, "max_rows must lie between 1 and 64, not " + std::to_string(max_rows));
    const Kernels *kernels = find_kernels(instruction_set);
    require(kernels != nullptr, std::string("this machine cannot run the instruction set ") + (instruction_set ? instruction_set : "") +
                                    "; choose one of " + instruction_set_names());
    *out = new dejavu_engine(model, threads, max_rows, kernels);
    return DEJAVU_OK;
  });
}

int dejavu_engine_predictor(dejavu_engine *engine, int64_t layer, int predicted, const dejavu_matrix *A, const dejavu_matrix *B, float threshold,
                            int lookahead) {
  return guarded([&] {
    require(engine != nullptr && A != nullptr && B != nullptr, "a pointer is missing");
    engine->set_predictor(layer, predicted, *A, *B, threshold, lookahead);
    return DEJAVU_OK;
  });
}

int dejavu_engine_gate(dejavu_engine *engine, int64_t layer, float threshold) {
  return guarded([&] {
    require(engine != nullptr, "a pointer is missing");
    engine->set_gate(layer, threshold);
    return DEJAVU_OK;
  });
}

int dejavu_engine_inputs(dejavu_engine *engine, int64_t layer, int point, const float *norms, int64_t count, float threshold) {
  return guarded([&] {
    require(engine != nullptr && norms != nullptr, "a pointer is missing");
    engine->set_inputs(layer, point, norms, count, threshold);
    return DEJAVU_OK;
  });
}

int dejavu_engine_screen(dejavu_engine *engine, const dejavu_matrix *centroids, const int32_t *members, const int32_t *sizes, float threshold) {
  return guarded([&] {
    require(engine != nullptr && centroids != nullptr && members != nullptr && sizes != nullptr, "a pointer is missing");
    engine->set_screen(*centroids, members, sizes, threshold);
    return DEJAVU_OK;
  });
}

int dejavu_engine_run(dejavu_engine *engine, const dejavu_block *block) {
  return guarded([&]() -> int {
    require(engine != nullptr && block != nullptr, "a pointer is missing");
    if (engine->run(*block)) return DEJAVU_OK;
    return fail(DEJAVU_NOT_FINITE, NOT_FINITE);
  });
}

int dejavu_engine_profile(dejavu_engine *engine, const dejavu_block *block, dejavu_profile *profile) {
  return guarded([&]() -> int {
    require(engine != nullptr && block != nullptr && profile != nullptr, "a pointer is missing");
    require(profile->fired && profile->groups, "a pointer of the profile is missing");
    if (engine->run(*block, profile)) return DEJAVU_OK;
    return fail(DEJAVU_NOT_FINITE, NOT_FINITE);
  });
}

int dejavu_engine_read(dejavu_engine *engine, const float *data, int64_t count, double *sum) {
  return guarded([&] {
    require(engine != nullptr && (data != nullptr || count == 0) && sum != nullptr, "a pointer is missing");
    require(count >= 0, "a count must not be negative, but is " + std::to_string(count));
    *sum = engine->read(data, count);
    return DEJAVU_OK;
  });
}

void dejavu_engine_free(dejavu_engine *engine) { delete engine; }

}
