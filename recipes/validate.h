// The checks that one field's type cannot express. load_recipe calls the first three; the trainer calls the others once
// it knows the number of ranks and the model's config.json. Those throw RecipeError with all problems at once.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "recipes/load.h"

namespace dsa {

// The three that load_recipe calls return instead of throwing: it has problems of its own to add.
std::vector<Problem> find_out_of_range(const ResolvedRecipe& resolved);

// What contradicts another field or the stage, or would be ignored. `unread`: paths whose value could not be read, which
// contradict nothing.
std::vector<Problem> find_contradictions(const ResolvedRecipe& resolved, const std::set<std::string>& unread);

// What the recipe should have said.
std::vector<Problem> find_missing(const ResolvedRecipe& resolved);

// The mesh: tensor * context divides world, expert divides world, the batch and the sequence split evenly.
void check_world(const ResolvedRecipe& resolved, int64_t world);

// What the recipe must know of a model, as plain numbers (config.json's names in the comments).
struct ModelFacts {
  int64_t heads = 0;                // num_attention_heads
  int64_t vocab = 0;                // vocab_size
  int64_t dense_intermediate = 0;   // intermediate_size; 0: no dense layer
  int64_t shared_intermediate = 0;  // moe_intermediate_size * n_shared_experts; 0: no shared expert
  int64_t experts = 0;              // n_routed_experts; 0: no MoE layer
  int64_t rope_dim = 0;             // qk_rope_head_dim
  int64_t max_positions = 0;        // max_position_embeddings; 0: not stated
  int64_t mtp_layers = 0;           // num_nextn_predict_layers
  bool has_indexer = false;         // the checkpoint (or config) has one, with
  int64_t indexer_heads = 0;        // index_n_heads
  int64_t indexer_head_dim = 0;     // index_head_dim
  int64_t indexer_top_k = 0;        // index_topk
};

// tensor divides what it splits, expert divides the experts, the indexer fits the model, top-k < sequence length.
void check_model(const ResolvedRecipe& resolved, const ModelFacts& model);

}  // namespace dsa
