// One block of tokens through the whole model. In: the block. Out: its logits and counts. What goes from part to part: pass.cpp.
#pragma once
#include "engine.h"

// One thread's part of it, by every thread of the engine's pool.
void run_block(dejavu_engine &engine, const dejavu_block &block, int thread);
