// What registers an entry: STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CPU, m) { m.impl("name", TORCH_BOX(&entry)); }
// The schemas are in wavlm_fast/backends/cpu.py.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace wavlm_fast {

// An argument that is `str` in the schema. Torch's own conversion to std::string, up to 2.13, leaks one at every call.
struct Text : std::string {
  using std::string::string;
};

}  // namespace wavlm_fast

template <>
struct torch::stable::detail::ToImpl<wavlm_fast::Text> {
  static wavlm_fast::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    std::size_t length;
    const char* first;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &first));
    const wavlm_fast::Text text(first, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
