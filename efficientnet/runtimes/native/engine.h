// The C interface of the native engine; docs/native.md tells what each function does.
#pragma once
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ENGINE_API __attribute__((visibility("default")))

typedef struct engine engine;

enum { ENGINE_KEEP_TENSORS = 1, ENGINE_KEEP_TIMES = 2, ENGINE_TAKE_PROGRAM = 4 };

ENGINE_API const char* engine_levels(void);
/* What the calling thread did in a short while with a level's instructions from registers alone, and
   the seconds: multiply-adds of u8 (what = 0) or bf16 (1), or vector instructions (2). -1: no such
   level here. */
ENGINE_API double engine_peak(const char* level, int what, double* seconds);
ENGINE_API engine* engine_open(const void* program, size_t program_bytes, const char* level,
                               int threads, int max_batch, int flags, char* error,
                               size_t error_bytes);
/* is_alone = 0: other work wants the cores, so that no two threads share an image, at whose every
   layer they would wait for each other. */
ENGINE_API int engine_infer(engine* self, const void* images, int is_pixels, int batch, int is_alone,
                            float* logits, char* error, size_t error_bytes);
ENGINE_API int engine_read_tensor(engine* self, int tensor, void* to, size_t bytes, char* error,
                                  size_t error_bytes);
ENGINE_API int engine_layer_times(engine* self, double* seconds, int layers);
ENGINE_API void engine_info(engine* self, int info[8]);
ENGINE_API const char* engine_level(engine* self);
ENGINE_API void engine_close(engine* self);

#ifdef __cplusplus
}
#endif
