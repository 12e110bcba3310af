//! Names of many files in one.

/// Expands braces as a shell does: `{000..012}` counts, with as many digits, and `{a,b}` names alternatives. Where there are several, the last
/// one changes first. Braces without `..` or a comma stay as they are.
///
/// # Errors
/// With a range that has no numbers or no end, or a million names or more.
pub fn expand_braces(pattern: &str) -> Result<Vec<String>, String> {
    const MOST: usize = 1_000_000;
    let Some((head, inner, tail)) = first_braces(pattern) else { return Ok(vec![pattern.to_string()]) };
    let choices = choices(inner).map_err(|reason| format!("{{{inner}}} in `{pattern}`: {reason}"))?;
    let tails = expand_braces(tail)?;
    if choices.len().saturating_mul(tails.len()) >= MOST {
        return Err(format!("`{pattern}` stands for a million names or more"));
    }
    Ok(choices.iter().flat_map(|choice| tails.iter().map(move |tail| format!("{head}{choice}{tail}"))).collect())
}

/// What stands before the first braces that can be expanded, in them, and behind them.
fn first_braces(pattern: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    while let Some(open) = pattern[from..].find('{').map(|at| from + at) {
        let close = open + pattern[open..].find('}')?;
        let inner = &pattern[open + 1..close];
        if inner.contains("..") || inner.contains(',') {
            return Some((&pattern[..open], inner, &pattern[close + 1..]));
        }
        from = close + 1;
    }
    None
}

fn choices(inner: &str) -> Result<Vec<String>, String> {
    let Some((first, last)) = inner.split_once("..") else { return Ok(inner.split(',').map(str::to_string).collect()) };
    let number = |text: &str| match text.parse::<u32>() {
        Ok(number) => Ok(number as usize),
        Err(_) => Err(format!("`{text}` is no number")),
    };
    let (low, high) = (number(first)?, number(last)?);
    if low > high {
        return Err("the first number is above the last".into());
    }
    let digits = first.len();
    Ok((low..=high).map(|number| format!("{number:0digits$}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_expand_as_in_a_shell() {
        assert_eq!(expand_braces("a.tar").unwrap(), ["a.tar"]);
        assert_eq!(expand_braces("s/{008..010}.tar").unwrap(), ["s/008.tar", "s/009.tar", "s/010.tar"]);
        assert_eq!(expand_braces("{a,b}-{0..1}").unwrap(), ["a-0", "a-1", "b-0", "b-1"]);
        assert_eq!(expand_braces("{x}/{1..2}").unwrap(), ["{x}/1", "{x}/2"]);
        assert_eq!(expand_braces("half{open").unwrap(), ["half{open"]);
    }

    #[test]
    fn bad_ranges_are_refused_by_name() {
        let error = |pattern: &str| expand_braces(pattern).unwrap_err();
        assert_eq!(error("{3..1}"), "{3..1} in `{3..1}`: the first number is above the last");
        assert!(error("{a..b}.tar").contains("`a` is no number"));
        assert!(error("{0..999}{0..999}").contains("a million"));
        assert!(error("{0..4000000}").contains("a million"));
    }
}
