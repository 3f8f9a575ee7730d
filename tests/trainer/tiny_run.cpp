#include "tests/trainer/tiny_run.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "data/hdf5_file.h"
#include "data/model_config.h"

namespace dsa::test {

Scratch::Scratch(Communicator& world) : world_(world) {
  std::string mine;
  if (world.rank() == 0) {
    std::string pattern = (std::filesystem::temp_directory_path() / "dsatrain-test-XXXXXX").string();
    mine = mkdtemp(pattern.data());
  }
  path_ = world.all_gather_text(mine)[0];
}

Scratch::~Scratch() {
  world_.barrier();  // nobody reads in it any more
  if (world_.rank() == 0) std::filesystem::remove_all(path_);
}

void write_inputs(const Scratch& scratch) {
  constexpr int64_t kTokens = 64 * 200 + 1;
  std::mt19937_64 random(7);
  std::vector<uint32_t> tokens;
  std::vector<int64_t> offsets{0};
  while (static_cast<int64_t>(tokens.size()) < kTokens) {
    const int64_t n = 5 + static_cast<int64_t>(random() % 86);
    for (int64_t i = 0; i < n; ++i) tokens.push_back(static_cast<uint32_t>(random() % 512));
    offsets.push_back(static_cast<int64_t>(tokens.size()));
  }
  Hdf5File file = Hdf5File::create(scratch / "tokens.h5");
  file.set_attribute("format", std::string("dsatrain.tokens"));
  file.set_attribute("version", int64_t{1});
  file.set_attribute("tokenizer_sha256", std::string(64, 'a'));
  file.set_attribute("vocab_size", int64_t{512});
  file.set_attribute("bos_id", int64_t{0});
  file.set_attribute("eos_id", int64_t{1});
  file.set_attribute("source", std::string("random"));
  file.write_dataset("/tokens", Dtype::U32, {static_cast<int64_t>(tokens.size())}, tokens.data());
  file.write_dataset("/document_offsets", Dtype::I64, {static_cast<int64_t>(offsets.size())}, offsets.data());
  file.close();

  ModelConfig config = ModelConfig::from_json_file(std::string(DSA_GOLDEN) + "/hf_v31_tiny/config.json");
  config.num_nextn_predict_layers = 1;
  std::ofstream(scratch / "config.json") << config.to_json(HfFormat::V31, HfDtype::FP32);
}

ResolvedRecipe recipe(const Scratch& scratch, const std::string& stage, const std::string& from, const std::string& folder,
                      std::vector<std::string> sets) {
  const std::string file = folder + ".textproto";
  std::filesystem::create_directories(std::filesystem::path(file).parent_path());
  std::ofstream out(file);
  out << "stage: " << stage << "\n";
  if (stage == "PRETRAIN")
    out << "model { config: \"" << scratch / "config.json" << "\" } init { random: true std: 0.02 }\n"
        << "loss { balance_alpha: 0.01 router_bias_speed: 0.01 }\n";
  else
    out << "init { from: \"" << from << "\" std: 0.05 }\n";
  if (stage == "WARMUP") out << "model { indexer { heads: 4 head_dim: 16 top_k: " << kTopK << " } }\n";
  out << "data { tokens: \"" << scratch / "tokens.h5" << "\" sequence_length: " << kSequence << " held_out: 4 }\n"
      << "batch { sequences: 4 micro_sequences: 1 }\n"
      << "optimizer { lr: 1e-3 eps: 1e-6 }\nschedule { steps: 3 }\n"
      << "compute { precision: FP64 recompute: LAYER query_block: 24 }\n"
      << "run { folder: \"" << folder << "\" log_every: 1000 }\n";
  out.close();
  return load_recipe(file, sets);
}

}  // namespace dsa::test
