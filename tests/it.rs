//! One binary for all integration tests: linking burn takes longer than running them.

mod it {
    mod bad_input;
    mod balancing;
    mod burns_own;
    mod clip;
    mod edge_cases;
    mod embedding;
    mod fixtures;
    mod input;
    mod kernels;
    mod language_models;
    mod layer;
    mod layer_options;
    mod lists;
    mod losses;
    mod moe_vie;
    mod outcome;
    mod packed;
    mod published;
    mod python;
    mod recipe;
    mod streams;
    mod structure;
    mod support;
    mod training;
    mod upcycle;
    mod upcycle_devices;
    mod upcycle_many;
    mod written_by_others;
}
