// Write the logits of llama.cpp for rows of token ids: `llama_logits MODEL ROWS OUT THREADS`.
// ROWS: int32, for each row its length, where logits begin, and its ids. OUT: float32, (logits, vocabulary).
// The cache is in float32 and attention is the plain one, so that only the products are rounded.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

static int fail(const char* what) {
  std::fprintf(stderr, "llama_logits: %s\n", what);
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 5) return fail("MODEL ROWS OUT THREADS are needed");
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (model == nullptr) return fail("the model cannot be loaded");
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = params.n_ubatch = 2048;
  params.n_threads = params.n_threads_batch = std::atoi(argv[4]);
  params.type_k = params.type_v = GGML_TYPE_F32;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) return fail("no context");
  const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  std::FILE* rows = std::fopen(argv[2], "rb");
  std::FILE* out = std::fopen(argv[3], "wb");
  if (rows == nullptr || out == nullptr) return fail("a file cannot be opened");
  int32_t head[2];
  while (std::fread(head, sizeof(int32_t), 2, rows) == 2) {
    std::vector<llama_token> ids(head[0]);
    if (std::fread(ids.data(), sizeof(int32_t), ids.size(), rows) != ids.size()) return fail("a row is cut off");
    llama_memory_clear(llama_get_memory(context), true);
    llama_batch batch = llama_batch_init(head[0], 0, 1);
    batch.n_tokens = head[0];
    for (int i = 0; i < head[0]; ++i) {
      batch.token[i] = ids[i];
      batch.pos[i] = i;
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = 0;
      batch.logits[i] = i >= head[1] && i + 1 < head[0];
    }
    if (llama_decode(context, batch) != 0) return fail("a row cannot be decoded");
    for (int i = head[1]; i + 1 < head[0]; ++i)
      std::fwrite(llama_get_logits_ith(context, i), sizeof(float), vocabulary, out);
    llama_batch_free(batch);
  }
  return std::fclose(out) == 0 ? 0 : fail("the logits cannot be written");
}
