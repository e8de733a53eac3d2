//! AdamW: its formula in f64, master weights, clipping, groups, and a run that is saved and resumed.

use std::collections::HashMap;

use anyhow::Result;
use candle_core::{backprop::GradStore, DType, Device, Tensor, Var};
use candle_fused_ops::{AdamW, AdamWConfig, ParameterGroup};
use candle_nn::Optimizer;

use crate::errors::text;
use crate::run::{bits, numbers, random, DTYPES};

const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, max_norm: Some(2.0) };
const STEPS: usize = 20;

/// Several tasks, and a ragged last one.
const SHAPES: [&[usize]; 2] = [&[97, 101], &[33]];
const DECAYS: [f64; 2] = [0.1, 0.0];

fn variables(dtype: DType) -> Result<Vec<Var>> {
    let var = |shape: &&[usize]| Ok(Var::from_tensor(&random(&format!("weights {shape:?}"), shape, dtype)?)?);
    SHAPES.iter().map(var).collect()
}

fn optimizer(variables: &[Var], config: AdamWConfig) -> Result<AdamW> {
    let group = |(index, var): (usize, &Var)| ParameterGroup {
        parameters: vec![(format!("p{index}"), var.clone())],
        weight_decay: DECAYS[index],
    };
    Ok(AdamW::new(variables.iter().enumerate().map(group), config)?)
}

/// The same gradients for every type, as far as it can hold them. They grow, so that later steps clip.
fn gradient(step: usize, index: usize, dtype: DType) -> Result<Tensor> {
    let size = 0.004 * step as f64;
    Ok((random(&format!("gradient {step} {index}"), SHAPES[index], DType::BF16)?.to_dtype(DType::F64)? * size)?
        .to_dtype(dtype)?)
}

/// A store that has these gradients: those of sum of (var * gradient).
fn store(variables: &[Var], step: usize) -> Result<GradStore> {
    let mut loss = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for (index, var) in variables.iter().enumerate() {
        let product = (var.as_tensor() * gradient(step, index, var.dtype())?)?;
        loss = (loss + product.to_dtype(DType::F64)?.sum_all()?)?;
    }
    Ok(loss.backward()?)
}

fn lr(step: usize) -> f64 {
    1e-2 / step as f64
}

/// Weights after each step, in f64, for gradients of `dtype`; and the norms.
fn formula(dtype: DType) -> Result<(Vec<Vec<f64>>, Vec<f64>)> {
    let mut w: Vec<Vec<f64>> = variables(dtype)?.iter().map(|var| numbers(var)).collect::<Result<_>>()?;
    let mut moments = w.iter().map(|w| vec![(0.0, 0.0); w.len()]).collect::<Vec<_>>();
    let mut norms = Vec::new();
    for step in 1..=STEPS {
        let gradients = (0..2).map(|index| numbers(&gradient(step, index, dtype)?)).collect::<Result<Vec<_>>>()?;
        let norm = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let factor = f64::min(1.0, CONFIG.max_norm.expect("a limit") / norm);
        norms.push(norm);
        for ((w, moments), (gradient, decay)) in w.iter_mut().zip(&mut moments).zip(gradients.iter().zip(DECAYS)) {
            for ((w, (m, v)), g) in w.iter_mut().zip(moments).zip(gradient) {
                let g = g * factor;
                *m = CONFIG.beta1 * *m + (1.0 - CONFIG.beta1) * g;
                *v = CONFIG.beta2 * *v + (1.0 - CONFIG.beta2) * g * g;
                let m_hat = *m / (1.0 - CONFIG.beta1.powi(step as i32));
                let v_hat = *v / (1.0 - CONFIG.beta2.powi(step as i32));
                *w -= lr(step) * decay * *w + lr(step) * m_hat / (v_hat.sqrt() + CONFIG.epsilon);
            }
        }
    }
    assert!(norms[0] < 2.0 && norms[STEPS - 1] > 2.0, "some steps clip and some do not");
    Ok((w, norms))
}

#[test]
fn steps_follow_the_formula_in_every_type() -> Result<()> {
    for dtype in DTYPES {
        let vars = variables(dtype)?;
        let mut optimizer = optimizer(&vars, CONFIG)?;
        let (want, norms) = formula(dtype)?;
        let wide = if dtype == DType::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
        for step in 1..=STEPS {
            let norm = optimizer.step(&store(&vars, step)?, lr(step))?;
            let (norm, want) = (numbers(&norm)?[0], norms[step - 1]);
            // The formula's own sum of 9,830 squares in f64 is off by up to 100 steps.
            let limit = (4.0 * wide + 100.0 * f64::EPSILON) * want;
            assert!((norm - want).abs() <= limit, "norm {norm} of step {step} {dtype:?}, not {want}");
        }
        assert_eq!(optimizer.steps(), STEPS);
        let state = optimizer.state()?;
        for (index, (var, want)) in vars.iter().zip(&want).enumerate() {
            let rounded = numbers(var)?;
            let weights = numbers(&state[&format!("p{index}")])?;
            for ((got, rounded), want) in weights.iter().zip(&rounded).zip(want) {
                // Each step rounds w once, and its change, below 0.1, some times.
                let limit = STEPS as f64 * wide * (want.abs() + 0.1);
                assert!((got - want).abs() <= limit, "p{index} {dtype:?}: {got} instead of {want}");
                assert_eq!(*rounded, crate::run::precision(dtype).round(*got), "the parameter is the rounded weight");
            }
        }
    }
    Ok(())
}

/// The master weights keep changes that bf16 rounds away.
#[test]
fn small_changes_of_bf16_parameters_add_up() -> Result<()> {
    let var = Var::ones(1, DType::BF16, &Device::Cpu)?;
    let group = ParameterGroup { parameters: vec![("w".into(), var.clone())], weight_decay: 0.0 };
    let mut optimizer = AdamW::new([group], AdamWConfig::default())?;
    for _ in 0..100 {
        optimizer.step(&var.sum_all()?.backward()?, 1e-3)?; // changes w by 1e-3, and half a step of bf16 is 2e-3
    }
    assert!((numbers(&var)?[0] - 0.9).abs() < 4e-3);
    Ok(())
}

#[test]
fn without_clipping_and_groups_it_is_candles_adamw() -> Result<()> {
    let (ours, theirs) = (variables(DType::F64)?, variables(DType::F64)?);
    let parameters = ours.iter().enumerate().map(|(index, var)| (index.to_string(), var.clone())).collect();
    let mut optimizer = AdamW::new([ParameterGroup { parameters, weight_decay: 0.01 }], AdamWConfig::default())?;
    let mut candle = candle_nn::AdamW::new_lr(theirs.clone(), 1e-3)?;
    for step in 1..=5 {
        optimizer.step(&store(&ours, step)?, 1e-3)?;
        candle.step(&store(&theirs, step)?)?;
    }
    for (ours, theirs) in ours.iter().zip(&theirs) {
        for (ours, theirs) in numbers(ours)?.into_iter().zip(numbers(theirs)?) {
            assert!((ours - theirs).abs() < 1e-14, "{ours} and {theirs}");
        }
    }
    Ok(())
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    let run = |threads: usize| -> Result<_> {
        let vars = variables(DType::BF16)?;
        let mut optimizer = optimizer(&vars, CONFIG)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        pool.install(|| {
            (1..=3)
                .try_for_each(|step| optimizer.step(&store(&vars, step)?, 1e-2).map(drop).map_err(anyhow::Error::from))
        })?;
        state_bits(&optimizer)
    };
    let one = run(1)?;
    assert!(one == run(2)? && one == run(5)?);
    Ok(())
}

/// Names and bits of the whole state.
fn state_bits(optimizer: &AdamW) -> Result<Vec<(String, Vec<Vec<u64>>)>> {
    let mut state: Vec<_> = optimizer.state()?.into_iter().collect();
    state.sort_by(|(a, _), (b, _)| a.cmp(b));
    state.into_iter().map(|(name, tensor)| Ok((name, bits(&[tensor])?))).collect()
}

#[test]
fn a_resumed_run_has_the_same_bits() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let vars = variables(dtype)?;
        let mut whole = optimizer(&vars, CONFIG)?;
        for step in 1..=3 {
            whole.step(&store(&vars, step)?, 1e-2)?;
        }
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("optimizer.safetensors");
        whole.save(&file, HashMap::from([("settings".to_string(), "lr 1e-2".to_string())]))?;
        let (_, header) = safetensors::SafeTensors::read_metadata(&std::fs::read(&file)?)?;
        assert_eq!(header.metadata().as_ref().expect("metadata")["settings"], "lr 1e-2");

        let resumed_vars: Vec<Var> =
            vars.iter().map(|var| Var::zeros(var.shape(), dtype, &Device::Cpu)).collect::<candle_core::Result<_>>()?;
        let mut resumed = optimizer(&resumed_vars, CONFIG)?;
        resumed.load(&file)?;
        assert_eq!(resumed.steps(), 3);
        for step in 4..=6 {
            whole.step(&store(&vars, step)?, 1e-2)?;
            resumed.step(&store(&resumed_vars, step)?, 1e-2)?;
        }
        assert_eq!(state_bits(&whole)?, state_bits(&resumed)?);
        let tensors = |vars: &[Var]| bits(&vars.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>());
        assert_eq!(tensors(&vars)?, tensors(&resumed_vars)?);
    }
    Ok(())
}

/// A file that cannot be replaced stays, and nothing else is left.
#[test]
fn a_save_that_fails_leaves_the_file_before() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("run");
    std::fs::create_dir(&path)?; // no file can replace a folder
    let error = optimizer(&variables(DType::F32)?, CONFIG)?.save(&path, HashMap::new()).expect_err("a folder");
    assert!(matches!(error, candle_core::Error::Io(_)), "{error:?}");
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1);
    Ok(())
}

/// Gradients that were added up in f32 are rounded to the type of their parameter.
#[test]
fn gradients_may_have_a_wider_type() -> Result<()> {
    let run = |wide: DType| -> Result<_> {
        let vars = variables(DType::BF16)?;
        let mut optimizer = optimizer(&vars, CONFIG)?;
        let mut gradients = store(&vars, 1)?;
        for var in &vars {
            let gradient = gradients.remove(var).expect("a gradient").to_dtype(wide)?;
            gradients.insert(var, gradient);
        }
        optimizer.step(&gradients, 1e-2)?;
        state_bits(&optimizer)
    };
    assert_eq!(run(DType::F32)?, run(DType::BF16)?);
    Ok(())
}

/// A state is a copy: later steps do not change it. Its weights set the parameters.
#[test]
fn a_state_can_be_restored() -> Result<()> {
    let vars = variables(DType::BF16)?;
    let mut optimizer = optimizer(&vars, CONFIG)?;
    let (start, before) = (optimizer.state()?, bits(&[vars[0].copy()?])?);
    optimizer.step(&store(&vars, 1)?, 1.0)?;
    assert_ne!(bits(&[vars[0].copy()?])?, before);
    optimizer.set_state(&start)?;
    assert_eq!(bits(&[vars[0].copy()?])?, before);
    assert_eq!(optimizer.steps(), 0);
    optimizer.step(&store(&vars, 1)?, 1.0)?;
    optimizer.set_state(&start)?;
    assert_eq!(bits(&[vars[0].copy()?])?, before);
    Ok(())
}

#[test]
fn only_matrices_decay_by_default() -> Result<()> {
    let variables = candle_nn::VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    candle_nn::linear(3, 2, vb.pp("b"))?;
    candle_nn::linear(3, 2, vb.pp("a"))?;
    let groups = ParameterGroup::decay_matrices(&variables, 0.1);
    let names = groups.each_ref().map(|g| g.parameters.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>());
    assert_eq!(names, [["a.weight", "b.weight"], ["a.bias", "b.bias"]]);
    assert_eq!(groups.map(|group| group.weight_decay), [0.1, 0.0]);
    Ok(())
}

#[test]
fn errors_name_the_parameter_and_change_nothing() -> Result<()> {
    let vars = variables(DType::F32)?;
    let mut optimizer = optimizer(&vars, CONFIG)?;
    let before = state_bits(&optimizer)?;
    let partial = vars[0].sum_all()?.backward()?;
    assert_eq!(
        text(optimizer.step(&partial, 1.0)),
        "1 of 2 parameters have no gradient: p1; an operator on their way to the loss drops it, or they should not be in the \
         optimizer"
    );
    let mut of_another_shape = store(&vars, 1)?;
    of_another_shape.insert(&vars[1], Tensor::zeros(34, DType::F32, &Device::Cpu)?);
    assert_eq!(
        text(optimizer.step(&of_another_shape, 1.0)),
        "the gradient of p1: shape must be [33] as the parameter, got [34]"
    );
    assert_eq!(text(optimizer.step(&store(&vars, 1)?, f64::NAN)), "lr must be finite and at least 0, got NaN");
    let state = optimizer.state()?;
    let with = |change: &dyn Fn(&mut HashMap<String, Tensor>)| {
        let mut state = state.clone();
        change(&mut state);
        state
    };
    for (state, expected) in [
        (with(&|state| drop(state.remove("p1.v"))), "the state has no tensor p1.v"),
        (
            with(&|state| drop(state.insert("p0.m".into(), state["p1.m"].clone()))),
            "p0.m: shape must be [97, 101] as its parameter, got [33]",
        ),
        (
            with(&|state| drop(state.insert("p1.m".into(), state["p1.m"].to_dtype(DType::F64).expect("f64")))),
            "p1.m: dtype must be F32, got F64",
        ),
        (
            with(&|state| drop(state.insert("p2.m".into(), state["p1.m"].clone()))),
            "the state has a tensor p2.m that no parameter of the optimizer uses",
        ),
    ] {
        assert_eq!(text(optimizer.set_state(&state)), expected);
    }
    assert_eq!(state_bits(&optimizer)?, before);

    let twice = |name: &str| ParameterGroup { parameters: vec![(name.into(), vars[0].clone())], weight_decay: 0.0 };
    let named = |name: &str| ParameterGroup { parameters: vec![(name.into(), vars[1].clone())], weight_decay: 0.0 };
    for (first, second, both) in
        [("w", "w", "w"), ("x", "x.v", "x.v"), ("x.m", "x", "x.m"), ("w", "adamw.step", "adamw.step")]
    {
        assert_eq!(
            text(AdamW::new([twice(first), named(second)], CONFIG)),
            format!(
                "parameter {second}: the names NAME, NAME.m and NAME.v of each parameter and adamw.step must all differ in the \
                 state, but {both} is there already; give it another name"
            )
        );
    }
    assert_eq!(
        text(AdamW::new([twice("wte"), twice("head")], CONFIG)),
        "parameters wte and head are one variable; leave one out, or each step updates it twice"
    );
    let config = AdamWConfig { beta2: 1.0, ..CONFIG };
    assert_eq!(text(AdamW::new([twice("w")], config)), "beta2 must be at least 0 and below 1, got 1");
    Ok(())
}
