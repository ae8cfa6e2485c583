// What norm_act.cpp does for other entries.
#pragma once

#include "norm_act.h"

namespace wavlm_fast {

// The kernel of the level in use.
template <class T>
NormAct<T>* norm_act_kernel();

}  // namespace wavlm_fast
