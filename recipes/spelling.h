// Did you mean: the candidate that a misspelt name most likely meant.
#pragma once

#include <string>
#include <vector>

namespace dsa {

// The candidate with the fewest edits (at most a third of the name's length), upper and lower case alike; empty when
// none is near.
std::string closest(const std::string& name, const std::vector<std::string>& candidates);

}  // namespace dsa
