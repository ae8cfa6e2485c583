// Where the utterances of a batch lie before and after an op that changes the number of frames: rows of a dense batch,
// or packed frames between offsets (wavlm_fast/ops/_packed.py).
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "packed_frames.h"

namespace wavlm_fast {

// All utterances one behind the other: utterance b is the frames in(b) to in(b + 1), and becomes out(b) to out(b + 1).
class ResizedFrames {
 public:
  ResizedFrames(int64_t count, int64_t in_frames, int64_t out_frames)
      : count_(count), in_frames_(in_frames), out_frames_(out_frames) {}
  ResizedFrames(std::vector<int64_t> in, std::vector<int64_t> out)
      : in_(std::move(in)), out_(std::move(out)), count_(in_.size() - 1), in_frames_(0), out_frames_(out_.back()) {}

  int64_t count() const { return count_; }
  bool equal() const { return in_.empty() || count_ == 1; }  // as those of a dense batch are
  int64_t in(int64_t b) const { return in_.empty() ? b * in_frames_ : in_[b]; }
  int64_t out(int64_t b) const { return out_.empty() ? b * out_frames_ : out_[b]; }
  int64_t in_frames(int64_t b) const { return in(b + 1) - in(b); }
  int64_t out_frames(int64_t b) const { return out(b + 1) - out(b); }

  // Of a row of the output tensor: of an utterance, or of all that are packed.
  int64_t row_frames() const { return out_frames_; }

 private:
  std::vector<int64_t> in_, out_;  // [B + 1] each; empty where equal utterances follow each other
  int64_t count_, in_frames_, out_frames_;
};

// Of `B` utterances of `frames` each, or with offsets of one row of packed frames; `frames_of` gives the output's
// frames for those of an utterance, less than one where there are too few.
template <class FramesOf>
ResizedFrames resized_frames(const char* op, int64_t B, int64_t frames, const std::optional<Tensor>& offsets,
                             const std::optional<Tensor>& out_offsets, std::optional<int64_t> out_frames,
                             const FramesOf& frames_of) {
  ENTRY_CHECK(offsets.has_value() == out_offsets.has_value() && offsets.has_value() == out_frames.has_value(), op,
              ": expected offsets, out_offsets and out_frames together, or none of them");
  const auto checked = [&](int64_t own) {
    const int64_t count = frames_of(own);
    ENTRY_CHECK(count > 0, op, ": expected ", offsets ? "offsets of utterances" : "utterances",
                " long enough for a frame, got one of ", own);
    return count;
  };
  if (!offsets) return {B, frames, checked(frames)};
  ENTRY_CHECK(B == 1, op, ": expected packed frames in one row beside offsets, got ", B, " rows");
  std::vector<int64_t> in = values_of(op, "offsets", *offsets, frames), out = {0};
  for (size_t b = 0; b + 1 < in.size(); ++b) out.push_back(out.back() + checked(in[b + 1] - in[b]));
  ENTRY_CHECK(*out_frames == out.back(), op, ": expected out_frames of ", out.back(), " for these offsets, got ",
              *out_frames);
  ENTRY_CHECK(values_of(op, "out_offsets", *out_offsets, *out_frames) == out, op, ": expected out_offsets of ",
              Sizes(out), " for these offsets, got others");
  return {std::move(in), std::move(out)};
}

}  // namespace wavlm_fast
